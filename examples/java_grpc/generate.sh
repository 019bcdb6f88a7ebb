#!/bin/sh
# Generates the stubs with protoc and protoc-gen-grpc-java, as `buf generate ../../protos` does.
set -eu
cd "$(dirname "$0")"
mkdir -p stubs
protoc -I "${TRIVIUM_PROTOS:-../../protos}" --java_out=stubs --grpc-java_out=stubs \
  trivium/chat/v1/chat.proto trivium/chat/v1/model.proto trivium/sampling/v1/sampling.proto
