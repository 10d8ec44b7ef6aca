"""The failover state machines: who may serve a shard, decided by votes of workers or by an etcd lease."""
