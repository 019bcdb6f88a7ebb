// Reads manifests of custom resources, a JSON list, from standard input and prints one line per error.
// Types find unknown fields; validators check patterns and ranges. Both come from the projects' own Go types.
import path from "node:path";
import { fileURLToPath } from "node:url";
import ts from "typescript";

const KINDS = {
  HTTPRoute: "@kubernetes-models/gateway-api/gateway.networking.k8s.io/v1/HTTPRoute",
  PodMonitor: "@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1/PodMonitor",
  ScaledObject: "@kubernetes-models/keda/keda.sh/v1alpha1/ScaledObject",
};
// Not in any package: inference.networking.k8s.io/v1 of the Gateway API Inference Extension 1.6.
const INFERENCE_POOL = `
  interface IInferencePool {
    apiVersion: "inference.networking.k8s.io/v1";
    kind: "InferencePool";
    metadata: { name: string; labels?: Record<string, string> };
    spec: {
      appProtocol?: "http" | "kubernetes.io/h2c";
      selector: { matchLabels: Record<string, string> };
      targetPorts: [{ number: number }, ...{ number: number }[]];
      endpointPickerRef?: {
        group?: string;
        kind?: string;
        name: string;
        port: { number: number };
        failureMode?: "FailOpen" | "FailClose";
      };
    };
  }`;

function source(manifests) {
  const imports = Object.entries(KINDS).map(([kind, module]) => `import type { I${kind} } from "${module}";`);
  const values = manifests.map(
    (manifest, index) => `export const m${index}: I${manifest.kind} = ${JSON.stringify(manifest)};`,
  );
  return [...imports, INFERENCE_POOL, ...values].join("\n");
}

function* typeErrors(manifests) {
  const file = path.join(path.dirname(fileURLToPath(import.meta.url)), "manifests.ts");
  const options = {
    strict: true,
    noEmit: true,
    skipLibCheck: true,
    types: [],
    target: ts.ScriptTarget.ES2022,
    module: ts.ModuleKind.NodeNext,
  };
  const host = ts.createCompilerHost(options);
  const read = host.getSourceFile.bind(host);
  host.getSourceFile = (name, version) =>
    name === file ? ts.createSourceFile(name, source(manifests), version) : read(name, version);
  for (const found of ts.getPreEmitDiagnostics(ts.createProgram([file], options, host))) {
    yield ts.flattenDiagnosticMessageText(found.messageText, " ");
  }
}

async function* invalidValues(manifests) {
  for (const manifest of manifests.filter(({ kind }) => kind in KINDS)) {
    const models = await import(KINDS[manifest.kind]);
    try {
      new models[manifest.kind](manifest).validate();
    } catch (error) {
      yield `${manifest.kind} ${manifest.metadata.name}: ${error.message}`;
    }
  }
}

const chunks = await Array.fromAsync(process.stdin);
const manifests = JSON.parse(Buffer.concat(chunks).toString());
for (const line of typeErrors(manifests)) console.log(line);
for await (const line of invalidValues(manifests)) console.log(line);
