#!/bin/sh
# Generates the stubs with protoc, protoc-gen-go and protoc-gen-go-grpc, as `buf generate ../../protos` does.
# The .proto files set no go_package, so each is mapped to a package under this module's path.
set -eu
cd "$(dirname "$0")"
protos=${TRIVIUM_PROTOS:-../../protos}
set --
for name in trivium/chat/v1/chat trivium/chat/v1/model trivium/sampling/v1/sampling; do
  folder=${name%/*}
  package=$(echo "${folder#trivium/}" | tr -d /)
  mapping="M$name.proto=example.com/chat/$folder;$package"
  set -- "$@" "--go_opt=$mapping" "--go-grpc_opt=$mapping" "$name.proto"
done
protoc -I "$protos" --go_out=. --go_opt=paths=source_relative \
  --go-grpc_out=. --go-grpc_opt=paths=source_relative "$@"
