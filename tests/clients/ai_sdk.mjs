// The Vercel AI SDK: node ai_sdk.mjs BASE_URL MODEL
import assert from "node:assert/strict";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const [baseURL, name] = process.argv.slice(2);
const provider = createOpenAICompatible({
  name: "trivium",
  baseURL,
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const model = provider(name);
const prompt = "What is the weather in Paris?";
const asked = [];
const tools = {
  weather: tool({
    description: "The weather in a city",
    inputSchema: z.object({ city: z.enum(["Paris", "Rome"]), days: z.number().int().min(1).max(9) }),
    execute: async (input) => {
      asked.push(input);
      return "Sunny";
    },
  }),
};

const plain = await generateText({ model, prompt, maxOutputTokens: 8, maxRetries: 0 });
assert.equal(typeof plain.text, "string");
assert.ok(plain.usage.outputTokens > 0);

const stream = streamText({ model, prompt, maxOutputTokens: 8, maxRetries: 0 });
let text = "";
for await (const piece of stream.textStream) text += piece;
assert.equal(text, await stream.text);
assert.ok((await stream.usage).inputTokens > 0);

// A forced call that the SDK executes and whose result it sends back.
const called = await generateText({
  model,
  prompt,
  tools,
  toolChoice: "required",
  stopWhen: stepCountIs(2),
  maxRetries: 0,
});
assert.equal(called.steps.length, 2);
assert.equal(called.steps[0].finishReason, "tool-calls");
assert.ok(asked.every((input) => ["Paris", "Rome"].includes(input.city)));

const streamed = streamText({
  model,
  prompt,
  tools,
  toolChoice: { type: "tool", toolName: "weather" },
  maxRetries: 0,
});
const [call] = await streamed.toolCalls;
assert.equal(call.toolName, "weather");
assert.ok(!call.invalid && Number.isInteger(call.input.days));

const schema = z.object({ sky: z.enum(["clear", "grey"]), degrees: z.number().int().min(0).max(40) });
const object = await generateText({ model, prompt, output: Output.object({ schema }), maxRetries: 0 });
schema.parse(object.output);

const unknown = generateText({ model: provider("none"), prompt, maxRetries: 0 });
await assert.rejects(unknown, (error) => error.statusCode === 404);
console.log("all is well");
