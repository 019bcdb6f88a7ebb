// Unpacks the Brotli-compressed Chromium of @sparticuz/chromium: `node unpack.mjs OUT`.
import fs from "node:fs";
import path from "node:path";
import zlib from "node:zlib";
import { fileURLToPath } from "node:url";

const packed = fileURLToPath(new URL("node_modules/@sparticuz/chromium/bin/", import.meta.url));
const out = process.argv[2];
for (const name of ["chromium", "al2023.tar", "fonts.tar"]) {
  const content = zlib.brotliDecompressSync(fs.readFileSync(path.join(packed, `${name}.br`)));
  fs.writeFileSync(path.join(out, name), content, { mode: 0o755 });
}
