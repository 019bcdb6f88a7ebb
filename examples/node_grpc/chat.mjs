// Streams an answer over gRPC:  npm ci && node chat.mjs [HOST:PORT] [QUESTION]
// The .proto files are loaded as they are; nothing is generated.

import { fileURLToPath } from "node:url";
import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const target = process.argv[2] ?? "127.0.0.1:50051";
const question = process.argv[3] ?? "What is the capital of France?";

const protos = process.env.TRIVIUM_PROTOS ?? fileURLToPath(new URL("../../protos", import.meta.url));
const definition = protoLoader.loadSync(
  ["trivium/chat/v1/chat.proto", "trivium/chat/v1/model.proto"],
  { includeDirs: [protos], keepCase: true, enums: String, longs: Number, defaults: true, oneofs: true },
);
const { ChatService, ModelService } = grpc.loadPackageDefinition(definition).trivium.chat.v1;
const credentials = grpc.credentials.createInsecure();

const models = new ModelService(target, credentials);
const model = await new Promise((resolve, reject) =>
  models.ListModels({}, (error, answer) => (error ? reject(error) : resolve(answer.models[0].id))),
);

const chat = new ChatService(target, credentials);
const stream = chat.StreamChatCompletion({
  model,
  messages: [{ role: "ROLE_USER", content: [{ text: question }] }],
  options: { sampling: { temperature: 0 }, max_completion_tokens: 100 },
});
for await (const { event, delta, usage } of stream) {
  if (event === "delta") {
    process.stdout.write(delta.content);
  } else if (event === "usage") {
    const seconds = (usage.device_nanoseconds / 1e9).toFixed(3);
    const tokens = `${usage.prompt_tokens} + ${usage.completion_tokens} tokens`;
    console.log(`\n[${tokens}, ${seconds} gpu_seconds]`);
  }
}
models.close();
chat.close();
