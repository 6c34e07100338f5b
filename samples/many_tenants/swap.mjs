// Adapters swapped at run time in node, with onnxruntime-node alone:
//
//     node swap.mjs swappable.onnx a.inputs.safetensors b.inputs.safetensors
//     node swap.mjs --paired paired.onnx a.inputs.safetensors b.inputs.safetensors
//
// README.md beside this file says how the files are made.
import { readFileSync } from "node:fs";
import * as ort from "onnxruntime-node";

const types = {
  F32: ["float32", Float32Array],
  F64: ["float64", Float64Array],
  I64: ["int64", BigInt64Array],
};

/** Tensors of a safetensors file, by name. */
function readSafetensors(path) {
  const file = readFileSync(path);
  const end = 8 + Number(file.readBigUInt64LE(0));
  const header = JSON.parse(file.toString("utf8", 8, end));
  delete header.__metadata__;
  return Object.fromEntries(
    Object.entries(header).map(([name, { dtype, shape, data_offsets: [from, to] }]) => {
      const [type, Numbers] = types[dtype];
      const bytes = new Uint8Array(file.subarray(end + from, end + to)); // a copy, and so aligned
      return [name, new ort.Tensor(type, new Numbers(bytes.buffer), shape)];
    }),
  );
}

const session = (path) => ort.InferenceSession.create(path, { logSeverityLevel: 3 });

/** Two rows of eight tokens. */
function example(graph) {
  const ids = BigInt64Array.from({ length: 16 }, (_, i) => BigInt(100 + i));
  const every = {
    input_ids: ids,
    attention_mask: ids.map(() => 1n),
    token_type_ids: ids.map(() => 0n),
  };
  const names = Object.keys(every).filter((name) => graph.inputNames.includes(name));
  return Object.fromEntries(names.map((n) => [n, new ort.Tensor("int64", every[n], [2, 8])]));
}

/** The members of an object whose names are in a list, or not. */
const pick = (object, names, wanted = true) =>
  Object.fromEntries(Object.entries(object).filter(([name]) => names.includes(name) === wanted));

const show = (what, outputs) =>
  console.log(what, Object.values(outputs)[0].dims, ...Object.values(outputs)[0].data.slice(0, 4));

const isPaired = process.argv[2] === "--paired";
const [model, ...adapters] = process.argv.slice(isPaired ? 3 : 2);
const graph = await session(model);
const expand = isPaired ? await session(model.replace(/\.onnx$/, ".expand.onnx")) : null;
const inputs = example(graph);
for (const path of adapters) {
  let adapter = readSafetensors(path);
  if (expand) {
    const weights = await expand.run(pick(adapter, expand.inputNames)); // once per adapter
    adapter = { ...weights, ...pick(adapter, expand.inputNames, false) };
  }
  show(path, await graph.run({ ...inputs, ...adapter }));
}
