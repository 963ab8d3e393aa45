"""etcd's v3 API as far as the etcd store needs it.  The only owner of grpc and protobuf: the extra `udptun[etcd]`."""
