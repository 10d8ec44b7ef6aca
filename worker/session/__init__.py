"""One life of a worker in a job: join, push, pull, reconnect, leave."""
