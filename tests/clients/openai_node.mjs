// The official Node client: node openai_node.mjs BASE_URL MODEL
import assert from "node:assert/strict";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const [baseURL, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "What is the weather in Paris?" }];
const tools = [
  {
    type: "function",
    function: {
      name: "weather",
      description: "The weather in a city",
      strict: true,
      parameters: {
        type: "object",
        properties: {
          city: { type: "string", enum: ["Paris", "Rome"] },
          days: { type: "integer", minimum: 1, maximum: 9 },
        },
        required: ["city", "days"],
        additionalProperties: false,
      },
    },
  },
];
const checkArguments = (text) => {
  const given = JSON.parse(text);
  assert.deepEqual(Object.keys(given).sort(), ["city", "days"]);
  assert.ok(["Paris", "Rome"].includes(given.city) && Number.isInteger(given.days));
};

const models = await client.models.list();
assert.ok(models.data.some((listed) => listed.id === model));

const plain = await client.chat.completions.create({ model, messages, max_completion_tokens: 8 });
assert.equal(typeof plain.choices[0].message.content, "string");

// A forced call; its result is sent back; then the same as a stream, which the client assembles.
const forced = { model, messages, tools, tool_choice: "required", parallel_tool_calls: false };
const called = await client.chat.completions.create(forced);
const [choice] = called.choices;
assert.equal(choice.finish_reason, "tool_calls");
assert.equal(choice.message.content, null);
checkArguments(choice.message.tool_calls[0].function.arguments);
const result = { role: "tool", tool_call_id: choice.message.tool_calls[0].id, content: "Sunny" };
const after = await client.chat.completions.create({
  model,
  messages: [...messages, choice.message, result],
  tools,
  tool_choice: "none",
  max_completion_tokens: 8,
});
assert.ok(["stop", "length"].includes(after.choices[0].finish_reason));

const runner = client.chat.completions.stream({
  ...forced,
  tool_choice: { type: "function", function: { name: "weather" } },
  stream_options: { include_usage: true },
});
const streamed = await runner.finalChatCompletion();
const [call] = streamed.choices[0].message.tool_calls;
assert.equal(call.function.name, "weather");
checkArguments(call.function.arguments);
assert.ok((await runner.totalUsage()).completion_tokens > 0);

// A schema from zod, parsed by the client.
const Weather = z.object({ sky: z.enum(["clear", "grey"]), degrees: z.number().int().min(0).max(40) });
const parsed = await client.chat.completions.parse({
  model,
  messages,
  response_format: zodResponseFormat(Weather, "weather"),
});
Weather.parse(parsed.choices[0].message.parsed);

const text = await client.completions.create({ model, prompt: "Once", max_tokens: 4, logprobs: 1 });
assert.equal(text.choices[0].logprobs.tokens.length, 4);
for await (const chunk of await client.completions.create({ model, prompt: "Once", stream: true }))
  assert.equal(chunk.object, "text_completion");

await assert.rejects(client.chat.completions.create({ model: "none", messages }), (error) => {
  assert.ok(error instanceof OpenAI.NotFoundError);
  assert.equal(error.code, "model_not_found");
  return true;
});
console.log("all is well");
