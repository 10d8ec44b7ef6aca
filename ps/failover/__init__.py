"""Hot standby: the primary's log, the replica that follows it, fencing, and leases in etcd."""
