// Classify an image in the browser with an exported student: student.onnx and its model card
// student.json beside this page. The image never leaves the browser.
//
// An image becomes the student's input as `python -m pipeline.commands.predict` makes it. The browser
// decodes it; this file resizes it, because a canvas resizes to other pixels than Pillow.
import * as ort from "onnxruntime-web";

ort.env.wasm.numThreads = 1; // more need a page that is isolated from other origins

const TOP = 5; // classes to show
const BICUBIC = { support: 2, weight: bicubic };
const BILINEAR = { support: 1, weight: (x) => Math.max(0, 1 - Math.abs(x)) };
const ONE = 2 ** 22; // Pillow's weights are whole multiples of 1 / ONE

// ---- The student

export async function loadStudent() {
  const card = await (await fetchFile("student.json")).json();
  if (card.no_file) throw new Error(`student.json says why there is no file: ${card.no_file}`);
  const file = await (await fetchFile("student.onnx")).arrayBuffer();
  if (crypto.subtle) { // https or localhost
    const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", file));
    const sha256 = Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
    if (sha256 !== card.file.sha256) {
      throw new Error("student.json describes another file than student.onnx: copy both again.");
    }
  }
  return { card, session: await ort.InferenceSession.create(file) };
}

async function fetchFile(name) {
  const response = await fetch(name);
  if (!response.ok) throw new Error(`${name} is not beside this page (${response.status}).`);
  return response;
}

/** Run the network on an input of `preprocess`: one raw score for each class. */
export async function logitsOf({ card, session }, input) {
  const { name, channels, image_size: side } = card.input;
  const image = new ort.Tensor("uint8", input, [1, channels, side, side]);
  const outputs = await session.run({ [name]: image });
  return outputs[card.output.name].data;
}

export function softmax(logits) {
  const largest = Math.max(...logits);
  const scaled = Array.from(logits, (logit) => Math.exp(logit - largest));
  const sum = scaled.reduce((a, b) => a + b);
  return scaled.map((value) => value / sum);
}

// ---- From an image file to the student's input

/** Uint8Array of channels x side x side values: the planes one after the other, rows from the top. */
export async function preprocess(file, card) {
  const { channels, image_size: side } = card.input;
  const { storage, image_size: stored, quality, bit_depth: bitDepth = 16 } = card.preprocessing;
  const { resize_ratio: ratio, interpolation } = card.preprocessing; // of storage `encoded`
  if (bitDepth !== 16 && (await isDeepPng(file))) {
    throw new Error(`This image has 16 bits a channel. The student was trained on images of
      ${bitDepth} bits, and a browser does not give them unchanged. Use an image of 8 bits.`);
  }
  let planes = await readPlanes(file, channels);
  if (storage === "pixels") {
    planes = planes.map((plane) => middleSquare(plane, stored, BICUBIC));
    if (stored !== side) planes = planes.map((plane) => middleSquare(plane, side, BICUBIC));
  } else {
    if (quality !== "original") planes = await encodeAndDecode(planes, stored, quality);
    const filter = interpolation === "bicubic" ? BICUBIC : BILINEAR;
    planes = planes.map((plane) => middleSquare(plane, side, filter, ratio));
  }
  const input = new Uint8Array(channels * side * side);
  planes.forEach((plane, channel) => input.set(plane.data, channel * side * side));
  return input;
}

/** Decode a file: upright, on white, 8 bits a channel, no colour profile applied; RGB or greyscale. */
async function readPlanes(file, channels) {
  const options = { imageOrientation: "from-image", colorSpaceConversion: "none" };
  const bitmap = await createImageBitmap(file, options);
  const { width, height } = bitmap;
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0);
  const rgba = context.getImageData(0, 0, width, height).data;
  const plane = (value) => {
    const data = new Uint8ClampedArray(width * height);
    for (let i = 0; i < data.length; i++) data[i] = value(4 * i);
    return { width, height, data };
  };
  if (channels === 3) return [0, 1, 2].map((channel) => plane((at) => rgba[at + channel]));
  const grey = (at) => 19595 * rgba[at] + 38470 * rgba[at + 1] + 7471 * rgba[at + 2];
  return [plane((at) => (grey(at) + 32768) >> 16)]; // as Pillow's mode L
}

/** Reduce the shorter side to `stored`, encode as JPEG, decode: the student saw such images. */
async function encodeAndDecode(planes, stored, quality) {
  const { width, height } = planes[0];
  const ratio = Math.min(1, stored / Math.min(width, height));
  const [columns, rows] = [width, height].map((side) => roundHalfToEven(side * ratio));
  const reduced = planes.map((plane) =>
    resize(plane, [0, 0, width, height], columns, rows, BICUBIC));
  const image = new ImageData(columns, rows);
  for (let i = 0; i < columns * rows; i++) {
    for (const channel of [0, 1, 2]) {
      image.data[4 * i + channel] = reduced[Math.min(channel, reduced.length - 1)].data[i];
    }
    image.data[4 * i + 3] = 255;
  }
  const canvas = new OffscreenCanvas(columns, rows);
  canvas.getContext("2d").putImageData(image, 0, 0);
  const encoded = await canvas.convertToBlob({ type: "image/jpeg", quality: quality / 100 });
  return readPlanes(encoded, planes.length);
}

async function isDeepPng(file) {
  const bytes = new Uint8Array(await file.slice(0, 25).arrayBuffer());
  return String.fromCharCode(...bytes.slice(1, 4)) === "PNG" && bytes[24] === 16;
}

// ---- Resizing, as Pillow's `Image.resize` with `box`: antialiased, each pass rounded to 8 bits.
// Of tall images Pillow 13 resizes columns first: then a pixel may differ by one level.

/** Resize the shorter side to round(`side` * `ratio`), and cut out the middle `side` x `side`. */
function middleSquare(plane, side, filter, ratio = 1) {
  const { width, height } = plane;
  const square = Math.min(width, height) * (side / Math.round(side * ratio));
  const [left, top] = [(width - square) / 2, (height - square) / 2];
  return resize(plane, [left, top, left + square, top + square], side, side, filter);
}

function resize(plane, [left, top, right, bottom], columns, rows, filter) {
  const across = resizeRows(plane, left, right, columns, filter);
  return resizeRows(across, top, bottom, rows, filter);
}

/** Resize each row's part from `start` to `end` to `length` pixels. Returns the transposed plane. */
function resizeRows({ width, height, data }, start, end, length, filter) {
  const resized = new Uint8ClampedArray(length * height);
  const scale = (end - start) / length;
  const stretch = Math.max(1, scale); // of the filter: it antialiases if the row shrinks
  for (let x = 0; x < length; x++) {
    const centre = start + (x + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - filter.support * stretch + 0.5));
    const last = Math.min(width, Math.trunc(centre + filter.support * stretch + 0.5));
    const raw = [];
    for (let i = first; i < last; i++) raw.push(filter.weight((i - centre + 0.5) / stretch));
    const sum = raw.reduce((a, b) => a + b);
    const weights = raw.map((weight) =>
      Math.sign(weight) * Math.round(Math.abs(weight / sum) * ONE));
    for (let y = 0; y < height; y++) {
      let value = ONE / 2;
      for (let i = first; i < last; i++) value += weights[i - first] * data[y * width + i];
      resized[x * height + y] = Math.floor(value / ONE);
    }
  }
  return { width: height, height: length, data: resized };
}

function bicubic(signed) {
  const x = Math.abs(signed);
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  if (x < 2) return ((-0.5 * x + 2.5) * x - 4) * x + 2;
  return 0;
}

function roundHalfToEven(value) {
  const floor = Math.floor(value);
  return value - floor === 0.5 ? floor + (floor % 2) : Math.round(value);
}

// ---- The page

const status = document.querySelector("[role=status]");
const result = document.querySelector("main");
const student = loadStudent();
let shown; // the file given last
student.then(() => (status.textContent = "Ready."), (error) => (status.textContent = error.message));

async function classify(file) {
  shown = file;
  result.hidden = true;
  status.textContent = `Classifying ${file.name} …`;
  try {
    const { card } = await student;
    const input = await preprocess(file, card);
    const probabilities = softmax(await logitsOf(await student, input));
    if (file !== shown) return;
    showInput(input, card.input);
    showClasses(probabilities, card.classes);
    result.hidden = false;
    status.textContent = `${file.name}, as the student sees it:`;
  } catch (error) {
    if (file !== shown) return;
    const unreadable = error.name === "InvalidStateError"; // of createImageBitmap
    status.textContent = unreadable
      ? `The browser cannot read ${file.name} as an image.`
      : error.message;
  }
}

function showInput(input, { channels, image_size: side }) {
  const canvas = document.querySelector("canvas");
  canvas.width = canvas.height = side;
  const image = new ImageData(side, side);
  for (let i = 0; i < side * side; i++) {
    for (const channel of [0, 1, 2]) {
      image.data[4 * i + channel] = input[Math.min(channel, channels - 1) * side * side + i];
    }
    image.data[4 * i + 3] = 255;
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}

function showClasses(probabilities, classes) {
  const order = probabilities.map((_, label) => label);
  order.sort((a, b) => probabilities[b] - probabilities[a]); // stable: of equals, the first
  const body = document.querySelector("tbody");
  body.replaceChildren();
  for (const label of order.slice(0, TOP)) {
    const row = body.insertRow();
    row.insertCell().textContent = classes[label];
    row.insertCell().textContent = `${(100 * probabilities[label]).toFixed(2)} %`;
  }
}

document.querySelector("input").addEventListener("change", ({ target }) => {
  if (target.files.length) classify(target.files[0]);
});
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  if (event.dataTransfer.files.length) classify(event.dataTransfer.files[0]);
});
