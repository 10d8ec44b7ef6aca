"""One worker's session in a job: join, push, pull, reconnect, leave."""
