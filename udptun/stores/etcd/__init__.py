"""The `etcd` store.  The only owner of grpc and protobuf: the extra `udptun[etcd]`."""
