"""Who runs a command that the documentation shows: a test, or nobody, and why.

"page: beginning of a command" --> test_... [FILE ...]  this test runs it, or one that is like it: see evidence.py
                               --> page says: words     what it needs is not where the tests run, as the page says
                               --> by hand: why         no test does, for a reason that no reader needs
"""

COMPARED = "test_both_runs_learn_the_digits"
TERMINALS = "test_three_terminals_of_the_quick_start_train"
STOPPED = "test_job_of_the_checkpointing_page_is_stopped_goes_on_and_gives_a_file_for_plain_torch"
CERTIFICATES = "test_certificates_of_the_security_page_serve_a_job_that_is_started_and_watched_by_hand"
TORCHRUN = "test_worker_killed_under_torchrun_comes_back_under_its_name_and_the_job_learns"
TOKEN = "by hand: the tests write a token of their own"
HOSTILE = "by hand: it needs minutes; tests/hostile/test_floods.py runs each flood for a moment"
LONG = "by hand: the figures beside it are of minutes of training; tests/worker/gradients/test_local_steps.py trains so"

#: Of the beginnings that fit the longest of the page itself counts, else the longest of any page, "". A page is named
#: as it lies below docs/.
RUN_BY = {
    ": .": "by hand: a part of setting up",
    ": pip install": "test_wheel_alone_runs_a_whole_job",
    ": make demo": COMPARED,
    ": make quick": "by hand: a tier of the tests; tests/test_tiers.py looks at what is in it",
    ": make check": "by hand: a tier of the tests; tests/test_tiers.py looks at what is in it",
    ": make test": "by hand: it is what runs the tests; the workflow of CI calls it",
    ": make bench": "test_each_system_has_a_row_and_the_right_answer",
    ": make chaos": "test_a_minute_of_random_faults_loses_doubles_and_leaves_nothing",
    ": make fuzz": "by hand: it needs minutes; tests/fuzz/test_corpus.py feeds its targets from the corpus",
    ": make gpu": "test_what_a_gpu_runs_works_with_the_cpu_in_its_place",
    ": make hostile": HOSTILE,
    ": make loops": "test_random_loops_are_what_plain_torch_makes_of_them",
    ": make soak": "test_servers_of_workers_that_die_and_join_for_a_minute_hold_on_to_nothing",
    ": python bench/allocations.py": "test_allocations",
    ": python bench/codec.py": "test_codec",
    ": python bench/idle.py": "test_idle_job_is_measured_on_both_sides",
    ": python bench/links.py": "test_links_measure_and_leave_no_namespace",
    ": python bench/links.py --rates 1000 --shards 1": "test_links_with_long_round_trips_measure_several_connections",
    ": python bench/overlap.py": "test_overlap_has_the_bits_of_training_alone",
    ": python bench/pushpull.py": "test_pushpull",
    ": python bench/tls.py": "test_tls_sends_and_receives_the_same_bytes_in_every_row",
    ": python bench/training.py": "test_training_through_a_server_ends_with_the_bits_of_plain_training",
    ": python bench/versus.py": "test_async_counts_the_pushes_of_all_workers_and_a_system_that_cannot_run_is_named",
    ": curl http": "test_counters_agree_with_what_was_pushed",
    ": ps-serve --mode sync": TERMINALS,
    ": ps-serve --workers 4 --listen host0:50051": "test_listening_for_other_machines_needs_a_flag",
    ": ps-serve --workers 4 --checkpoint": "test_object_store_keeps_a_job_as_a_folder_does",
    ": ps-worker --servers": TERMINALS,
    ": ps-run -n 2 --task digits": "test_a_task_trains_and_says_what_it_did",
    ": ps-run -n 2 --task digits --checkpoint": STOPPED,
    ": ps-run -n 2 --task gpt --mode async": "test_a_slow_worker_does_less_of_an_asynchronous_job",
    ": ps-run -n 2 --task gpt --samples 400": "test_gpt_of_the_page_learns_its_text_and_leaves_a_timeline",
    ": ps-run -n 2 train.py": "test_the_example_trains_as_a_script",
    ": ps-run -n 2 --models": "test_torch_distributed_and_two_models_of_a_script_work_beside_each_other",
    ": ps-serve --workers 4 --models": "test_two_models_of_one_shape_train_as_without_servers",
    ": ps-compare": COMPARED,
    ": ps-export": STOPPED,
    ": ps-status": "test_status_shows_workers_and_shards",
    ": ps-status --servers 127.0.0.1:50051 --watch": (
        "test_watch_shows_rates_that_agree_with_the_counters_and_ends_with_ctrl_c"
    ),
    ": tensorboard": "by hand: tests/worker/training/test_tensorboard.py reads the files; the board was looked at",
    "gpu: ps-serve": "page says: None of this was run on a GPU",
    "integrations: ps-run -n 2 --checkpoint": (
        "by hand: tests/integrations/test_resume_from_checkpoint.py starts the servers and the trainer by themselves"
    ),
    "machines/docker: docker": "page says: There is no Docker where the tests run",
    "machines/docker: echo": TOKEN,
    "machines/docker: umask": TOKEN,
    "machines/kubernetes: kubectl": "page says: need a cluster, which was not there",
    "machines/kubernetes: openssl": TOKEN,
    "machines/kubernetes: umask": TOKEN,
    "machines/ray: ps-run": "test_killed_worker_and_killed_lead_come_back_on_ray_and_the_job_learns_and_is_kept",
    "machines/ray: ray job submit": "page says: `ray job submit` have not been tried",
    "machines/slurm: sbatch": "test_killed_worker_comes_back_and_a_requeued_job_goes_on_to_what_it_should_learn",
    "machines/torchrun: openssl": CERTIFICATES,
    "machines/torchrun: ps-serve": TORCHRUN,
    "machines/torchrun: torchrun": TORCHRUN,
    "modes: ps-run": LONG,
    "benchmark-log: ps-run": LONG,
    "security: make hostile": HOSTILE,
    "security: ": CERTIFICATES,
    "observability: ps-compare": "test_a_comparison_runs_every_seed_and_keeps_what_each_wrote",
    "observability: ps-run -n 2 --task digits": "test_a_job_writes_the_figures_of_its_events_for_every_worker",
    "failover: ps-serve": (
        "test_a_standby_shows_certificate_and_token_and_serves_with_them "
        "tests/support/replicated.py tests/support/certificates.py"
    ),
}
