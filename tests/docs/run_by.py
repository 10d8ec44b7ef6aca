"""Who runs a command that the documentation shows: a test, or nobody, as the page says with the reason.

"page: beginning of a command" --> tests/...      runs it, on a free port, with fewer samples, or as a script of its own
                               --> other text     stands on the page: this could not be run, and why
"""

#: The longest beginning that fits counts. A page is named as it lies below docs/, "" is any.
RUN_BY = {
    ": .": "Makefile",
    ": pip install": "tests/test_package.py",
    ": make demo": "tests/compare/test_end_to_end.py",
    ": make test": ".github/workflows/ci.yml",
    ": make bench": "tests/bench/test_bench.py",
    ": make chaos": "tests/chaos/test_chaos.py",
    ": make fuzz": "tests/fuzz/test_corpus.py",
    ": make soak": "tests/soak/test_soak.py",
    ": python bench/": "tests/bench/test_bench.py",
    ": curl http": "tests/server/test_monitoring.py",
    ": ps-serve --mode sync": "tests/conformance/test_digits.py",
    ": ps-serve --workers 4 --listen host0:50051 --insecure": "tests/server/test_commands.py",
    ": ps-serve --workers 4 --checkpoint": "tests/checkpoint/test_places.py",
    ": ps-worker --servers": "tests/docs/test_run.py",
    ": ps-run -n 2 --task digits": "tests/launch/test_jobs.py",
    ": ps-run -n 2 --task digits --checkpoint": "tests/docs/test_run.py",
    ": ps-run -n 2 --task digits --samples 6400 --tensorboard": "tests/worker/test_board.py",
    ": ps-run -n 2 --task gpt": "tests/tasks/test_gpt.py",
    ": ps-run -n 2 --task gpt --samples 400 --trace": "tests/trace/test_trace.py",
    ": ps-run -n 2 train.py": "tests/launch/test_jobs.py",
    ": ps-compare": "tests/compare/test_end_to_end.py",
    ": ps-compare --task digits --runs sync,async,async:compress=int8 --seeds": "tests/compare/test_seeds.py",
    ": ps-export": "tests/docs/test_run.py",
    ": ps-status": "tests/server/test_commands.py",
    ": tensorboard": "tests/worker/test_board.py",
    "gpu: ps-serve": "None of this was run on a GPU",
    "machines/docker: docker": "There is no Docker where the tests run",
    "machines/docker: umask": "tests/places/test_docker.py",
    "machines/docker: echo": "tests/places/test_docker.py",
    "machines/kubernetes: umask": "tests/places/test_kubernetes.py",
    "machines/kubernetes: openssl": "tests/places/test_kubernetes.py",
    "machines/kubernetes: kubectl": "need a cluster, which was not there",
    "machines/ray: ps-run": "tests/places/test_ray.py",
    "machines/ray: ray job submit": "`ray job submit` have not been tried",
    "machines/slurm: sbatch": "tests/places/test_slurm.py",
    "machines/torchrun: openssl": "tests/places/test_torchrun.py",
    "machines/torchrun: ps-serve": "tests/places/test_torchrun.py",
    "machines/torchrun: torchrun": "tests/places/test_torchrun.py",
    "security: ": "tests/docs/test_run.py",
    "standby: ps-serve": "tests/standby/test_options.py",
}
