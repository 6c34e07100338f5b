// A page that swaps FourierFT adapters under one ONNX model, with onnxruntime-web alone.
import * as ort from "./ort.wasm.bundle.min.mjs";

ort.env.wasm.numThreads = 1; // more threads need headers that a plain file server does not send
ort.env.wasm.wasmPaths = { wasm: new URL("./ort-wasm-simd-threaded.wasm", import.meta.url).href };

const TYPES = { F32: ["float32", Float32Array], I64: ["int64", BigInt64Array] };
const SIZE = 8; // pixels of a side, as the model sees them
const FINE = 32; // scikit-learn's digits are means over 4 x 4 pixels of such a bitmap
const SEEN = {
  upright: ["The digit as it was drawn.", (x, y) => [x, y]],
  inverted: ["Black on white instead of white on black.", (x, y) => [x, y]],
  rotated: ["Turned by a quarter, counter-clockwise.", (x, y) => [SIZE - 1 - y, x]],
};
const EXAMPLE = [[[0.22, 0.12], [0.8, 0.12], [0.62, 0.4], [0.45, 0.9]]]; // a seven
const $ = (id) => document.getElementById(id);

/** Tensors of a safetensors file, by name: 8 bytes with the header's length, the header, data. */
export function readSafetensors(buffer) {
  const end = 8 + Number(new DataView(buffer).getBigUint64(0, true));
  const { __metadata__, ...header } = JSON.parse(new TextDecoder().decode(buffer.slice(8, end)));
  const tensor = ([name, { dtype, shape, data_offsets: [from, to] }]) => {
    const [type, Numbers] = TYPES[dtype];
    return [name, new ort.Tensor(type, new Numbers(buffer.slice(end + from, end + to)), shape)];
  };
  return Object.fromEntries(Object.entries(header).map(tensor));
}

/** The base without an adapter: spectra of zeros, in the shapes of another adapter's inputs. */
export function zeroAdapter(adapter) {
  const zeros = ([name, { type, dims, data }]) => [
    name,
    name.includes(".entries.") ? adapter[name] : new ort.Tensor(type, data.map(() => 0), dims),
  ];
  return Object.fromEntries(Object.entries(adapter).map(zeros));
}

/** The pixels of a tenant's image, from the upright one. */
export function change(pixels, tenant) {
  const place = SEEN[tenant][1];
  return pixels.map((_, i) => {
    const [x, y] = place(i % SIZE, Math.floor(i / SIZE));
    const value = pixels[y * SIZE + x];
    return tenant === "inverted" ? 1 - value : value;
  });
}

/** Strokes (lists of points) as 8 x 8 grey values in 0..1; the digit fills the image's height. */
function toPixels(strokes) {
  const points = strokes.flat();
  if (points.length === 0) return new Float32Array(SIZE * SIZE);
  const [xs, ys] = [0, 1].map((axis) => points.map((point) => point[axis]));
  const [left, right] = [Math.min(...xs), Math.max(...xs)];
  const [top, bottom] = [Math.min(...ys), Math.max(...ys)];
  const scale = (FINE - 5) / Math.max(bottom - top, right - left, 0.05);
  const canvas = new OffscreenCanvas(FINE, FINE);
  const pen = canvas.getContext("2d");
  const at = ([x, y]) => [
    FINE / 2 + (x - (left + right) / 2) * scale,
    FINE / 2 + (y - (top + bottom) / 2) * scale,
  ];
  drawStrokes(pen, strokes, at, 3.6);
  const { data } = pen.getImageData(0, 0, FINE, FINE);
  const block = FINE / SIZE;
  const pixels = new Float32Array(SIZE * SIZE);
  for (let i = 0; i < FINE * FINE; i += 1) {
    const cell = Math.floor(i / FINE / block) * SIZE + Math.floor((i % FINE) / block);
    pixels[cell] += data[4 * i + 3] / 255 / block ** 2;
  }
  return pixels;
}

function drawStrokes(pen, strokes, at, width) {
  pen.lineWidth = width;
  pen.lineCap = pen.lineJoin = "round";
  pen.strokeStyle = "#fff";
  for (const stroke of strokes) {
    pen.beginPath();
    pen.moveTo(...at(stroke[0]));
    for (const point of stroke.length > 1 ? stroke.slice(1) : stroke) pen.lineTo(...at(point));
    pen.stroke();
  }
}

const softmax = (logits) => {
  const top = Math.max(...logits);
  const powers = Array.from(logits, (value) => Math.exp(value - top));
  const sum = powers.reduce((a, b) => a + b);
  return powers.map((value) => value / sum);
};

function showAnswer(digit, bars, probabilities) {
  $(digit).textContent = probabilities.indexOf(Math.max(...probabilities));
  $(bars).replaceChildren(
    ...probabilities.map((share, number) => {
      const line = document.createElement("li");
      line.append(String(number), document.createElement("b"), document.createElement("span"));
      const bar = line.children[0].appendChild(document.createElement("i"));
      bar.style.width = `${100 * share}%`;
      line.children[1].textContent = `${Math.round(100 * share)} %`;
      return line;
    }),
  );
}

const session = await ort.InferenceSession.create("model.onnx");
const tenants = await (await fetch("tenants.json")).json();
const first = await (await fetch(tenants[0].file)).arrayBuffer();
const base = zeroAdapter(readSafetensors(first));

/** Logits of images (n x 64 values) with an adapter's inputs. */
export async function run(pixels, adapter) {
  const shape = [pixels.length / SIZE ** 2, 1, SIZE, SIZE];
  const images = new ort.Tensor("float32", Float32Array.from(pixels), shape);
  return (await session.run({ pixel_values: images, ...adapter })).logits.data;
}

let strokes = EXAMPLE;
let current = { name: "upright", adapter: base };
let pending = Promise.resolve(); // one run at a time

async function choose(tenant) {
  const started = performance.now();
  if (tenant.file) {
    const answer = await fetch(tenant.file, { cache: "no-store" });
    const bytes = await answer.arrayBuffer();
    current = { name: tenant.name, adapter: readSafetensors(bytes), bytes: bytes.byteLength };
  } else current = { name: tenant.name, adapter: base, bytes: 0 };
  current.swap = performance.now() - started;
  for (const button of $("tenants").children)
    button.setAttribute("aria-checked", String(button.dataset.name === tenant.name));
  await predict();
}

async function predict() {
  const { name, adapter, bytes, swap } = current;
  const pixels = change(toPixels(strokes), name);
  const pen = $("seen").getContext("2d");
  const grey = pen.createImageData(SIZE, SIZE);
  pixels.forEach((value, i) => grey.data.set([255 * value, 255 * value, 255 * value, 255], 4 * i));
  pen.putImageData(grey, 0, 0);
  $("what").textContent = SEEN[name][0];
  const started = performance.now();
  const [plain, adapted] = [await run(pixels, base), await run(pixels, adapter)];
  const each = (performance.now() - started) / 2;
  showAnswer("base-digit", "base-bars", softmax(plain));
  showAnswer("digit", "bars", softmax(adapted));
  const fetched = bytes ? `Swap: ${(bytes / 1000).toFixed(1)} KB in ${swap.toFixed(0)} ms. ` : "";
  $("status").textContent = `${fetched}One prediction: ${each.toFixed(1)} ms.`;
}

function redraw() {
  const pad = $("pad");
  const pen = pad.getContext("2d");
  pen.clearRect(0, 0, pad.width, pad.height);
  drawStrokes(pen, strokes, ([x, y]) => [x * pad.width, y * pad.height], 26);
  pending = pending.then(predict);
}

const pointOf = (event) => {
  const { left, top, width, height } = $("pad").getBoundingClientRect();
  return [(event.clientX - left) / width, (event.clientY - top) / height];
};
let drawing = false;
$("pad").addEventListener("pointerdown", (event) => {
  if (strokes === EXAMPLE) strokes = [];
  drawing = true;
  $("pad").setPointerCapture(event.pointerId);
  strokes.push([pointOf(event)]);
  redraw();
});
$("pad").addEventListener("pointermove", (event) => {
  if (!drawing) return;
  strokes.at(-1).push(pointOf(event));
  redraw();
});
$("pad").addEventListener("pointerup", () => (drawing = false));
$("clear").addEventListener("click", () => {
  strokes = [];
  redraw();
});

for (const tenant of [{ name: "upright" }, ...tenants]) {
  const button = document.createElement("button");
  button.setAttribute("role", "radio");
  button.dataset.name = tenant.name;
  const size = tenant.bundle_bytes ? `${(tenant.bundle_bytes / 1000).toFixed(1)} KB` : "no adapter";
  button.innerHTML = `${tenant.name} <small>${size}</small>`;
  button.addEventListener("click", () => (pending = pending.then(() => choose(tenant))));
  $("tenants").append(button);
}
const asked = new URLSearchParams(location.search);
const start = [{ name: "upright" }, ...tenants].find(({ name }) => name === asked.get("tenant"));
redraw();
pending = pending.then(() => choose(start ?? { name: "upright" }));
await pending;

// For tests: logits of the images in check.json, with every adapter.
if (asked.has("check")) {
  const images = await (await fetch("check.json")).json();
  const found = { upright: Array.from(await run(images.flat(), base)) };
  for (const { name, file } of tenants) {
    const adapter = readSafetensors(await (await fetch(file)).arrayBuffer());
    found[name] = Array.from(await run(images.flat(), adapter));
  }
  $("check").textContent = JSON.stringify(found);
}
