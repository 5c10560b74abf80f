// What the page shows, and what it does when someone chooses images, types or clicks.

import { MOST_MM, assess, gestationalAge, inMm, judge, resizeImage } from "./measurement.js";
import { outlinePath } from "./drawing.js";
import { decode, pixelsAreTrue, readGray } from "./images.js";
import { decodeText, findRow, measurementsCsv, readPixelSizes } from "./csv.js";
import { startNetwork, unpack } from "./network.js";

const FLAGS = {
  no_head: "No head was found.",
  covers_image: "The network marked the whole image: there is no edge to measure.",
  implausible_size: "No fetal head is this large or small: look at the pixel size.",
  uncertain_size: "The outline is soft: the size depends on where the head is taken to end.",
  touches_border: "The head reaches the image’s border: what lies outside can’t be seen.",
  several_components: "The network marked several regions; the largest was measured.",
  low_ellipse_agreement: "The marked region is far from an ellipse.",
  low_confidence: "The network is unsure of its outline.",
};
const SHORT_FLAGS = {
  no_head: "no head",
  covers_image: "whole image",
  implausible_size: "implausible size",
  uncertain_size: "uncertain size",
  touches_border: "border",
  several_components: "several regions",
  low_ellipse_agreement: "not elliptic",
  low_confidence: "unsure",
};
const NONE = "–";

const element = (id) => document.getElementById(id);
const settings = JSON.parse(element("settings").textContent);

/** Images in the order in which they were chosen, measured or not. */
const images = [];
/** What CSVs say of pixel sizes, by file name. */
const pixelSizes = new Map();
let pixelSizeOfAll = null;
let selected = null;
let waiting = Promise.resolve();
/** How often all images were removed: what is being measured then isn't wanted any more. */
let removals = 0;

// ---------------------------------------------------------------- measuring

const network = start();

async function start() {
  try {
    if (!(await pixelsAreTrue())) {
      throw new Error(
        "this browser changes the pixels that a page reads, as a protection from fingerprinting: " +
          "allow this page to read canvases, or use another browser",
      );
    }
    const run = await startNetwork(settings);
    if (!images.length) say("Ready.");
    return run;
  } catch (error) {
    say("");
    problem(`The page can’t measure here: ${error.message}.`);
    element("files").disabled = true;
    return null;
  }
}

async function measure(image) {
  const gray = await readGray(image.file);
  const [height, width] = settings.imageSize;
  const logits = await (await network)(resizeImage(gray, height, width));
  const { mask, ...assessment } = assess(
    logits,
    gray.height,
    gray.width,
    settings.outlinePx,
  );
  const size = { width: gray.width, height: gray.height };
  Object.assign(image, size, assessment, { outline: outlinePath(mask) });
}

/** Takes files: images to measure, and CSVs of pixel sizes. */
function take(files) {
  if (element("files").disabled) return;
  element("problems").replaceChildren();
  const chosen = [...files];
  const isCsv = ({ name }) => name.toLowerCase().endsWith(".csv");
  // As they lie beside images in a folder.
  const isOther = ({ name }) => name.startsWith(".") || name.endsWith("_Annotation.png");
  const others = chosen.filter(isOther);
  if (others.length) {
    problem(`Left out as hidden or an outline of HC18: ${count(others.length, "file")}.`);
  }
  const rest = chosen.filter((file) => !isOther(file));
  waiting = waiting.then(async () => {
    for (const file of rest.filter(isCsv)) await takePixelSizes(file);
    await measureAll(rest.filter((file) => !isCsv(file)));
  });
}

async function measureAll(files) {
  if (!(await network)) return;
  const begun = performance.now();
  const begunAt = removals;
  const stopped = () => removals !== begunAt;
  let measured = 0;
  for (const [index, file] of files.entries()) {
    say(`Measuring ${index + 1} of ${files.length}: ${file.name}`);
    const image = { file, name: file.name, pixelSizeMm: null };
    image.pixelSizeMm = sizeIn(pixelSizes, file.name) ?? pixelSizeOfAll;
    try {
      await measure(image);
      if (stopped()) return;
      images.push(image);
      addRow(image);
      measured++;
      if (measured === 1) await select(image);
    } catch (error) {
      problem(`${file.name} ${error.message}.`);
    }
    // Lets the browser draw and answer.
    await new Promise((resolve) => setTimeout(resolve));
  }
  showAll();
  const seconds = ((performance.now() - begun) / 1000).toFixed(1);
  if (files.length) say(`Measured ${count(measured, "image")} in ${seconds} s.`);
}

async function takePixelSizes(file) {
  try {
    const sizes = readPixelSizes(decodeText(new Uint8Array(await file.arrayBuffer())), file.name);
    for (const [name, row] of sizes) pixelSizes.set(name, row);
    for (const image of images) image.pixelSizeMm = sizeIn(sizes, image.name) ?? image.pixelSizeMm;
    // Each image has its own; typing one for all would be a slip.
    element("for-all").checked = false;
    showAll();
    const usable = [...sizes.values()].filter(({ size }) => size).length;
    say(`${file.name}: ${count(usable, "pixel size")}.`);
  } catch (error) {
    problem(`${file.name} ${error.message}.`);
  }
}

/** Returns the pixel size that a CSV gives a file, if any; says so where it is none. */
function sizeIn(sizes, name) {
  const row = findRow(sizes, name);
  if (row?.problem) problem(`${name} ${row.problem}.`);
  return row?.size;
}

function count(number, noun) {
  return `${number} ${noun}${number === 1 ? "" : "s"}`;
}

function say(text) {
  element("status").textContent = text;
}

function problem(text) {
  const item = document.createElement("li");
  item.textContent = text;
  element("problems").append(item);
}

// ---------------------------------------------------------------- showing

/** Returns the texts of an image's measures; in pixels where the pixel size isn't known. */
function texts({ head, pixelSizeMm }) {
  if (!head) return { hc: NONE, bpd: NONE, ofd: NONE, age: NONE, weeks: NONE };
  const { hcMm, bpdMm, ofdMm } = inMm(head, pixelSizeMm ?? 1);
  if (pixelSizeMm === null) {
    const pixels = (value) => `${value.toFixed(0)} px`;
    const age = "needs the pixel size";
    return { hc: pixels(hcMm), bpd: pixels(bpdMm), ofd: pixels(ofdMm), age, weeks: NONE };
  }
  const mm = (value) => `${value.toFixed(1)} mm`;
  const age = gestationalAge(hcMm);
  return {
    hc: mm(hcMm),
    bpd: mm(bpdMm),
    ofd: mm(ofdMm),
    age: age
      ? `${inWeeks(age.weeks)} (${inWeeks(age.low)} to ${inWeeks(age.high)})`
      : "not given: HC is outside of 68 to 360 mm",
    weeks: age ? age.weeks.toFixed(1) : NONE,
  };
}

/** Weeks and days, as they are written: 20w 3d. */
function inWeeks(weeks) {
  const days = Math.round(7 * weeks);
  return `${Math.floor(days / 7)}w ${days % 7}d`;
}

async function select(image) {
  selected = image;
  hideScaleTool();
  showAll();
  element("image-name").textContent = image.name;
  // The file may have left the disk.
  const bitmap = await decode(image.file).catch(() => null);
  if (selected !== image) return;
  const canvas = element("canvas");
  [canvas.width, canvas.height] = [image.width, image.height];
  canvas.setAttribute("aria-label", `Ultrasound image ${image.name}`);
  if (bitmap) canvas.getContext("2d").drawImage(bitmap, 0, 0);
  else problem(`${image.name} can’t be read any more: what was measured stands.`);
  bitmap?.close();
  draw(image);
}

function draw({ width, height, outline, head }) {
  // Pixel centres lie at integers, so the image begins at -0.5.
  for (const id of ["drawing", "scale-drawing"]) {
    element(id).setAttribute("viewBox", `-0.5 -0.5 ${width} ${height}`);
  }
  element("picture").style.setProperty("--width", `${width}px`);
  element("outline").setAttribute("d", outline);
  element("measured").toggleAttribute("hidden", !head);
  if (!head) return;
  const { centerX, centerY, semiMajor, semiMinor, angle } = head.ellipse;
  const degrees = (angle * 180) / Math.PI;
  element("measured").setAttribute(
    "transform",
    `translate(${centerX} ${centerY}) rotate(${degrees})`,
  );
  set("ellipse", { rx: semiMajor, ry: semiMinor });
  set("major", { x1: -semiMajor, x2: semiMajor });
  set("minor", { y1: -semiMinor, y2: semiMinor });
}

function set(id, attributes) {
  for (const [name, value] of Object.entries(attributes)) element(id).setAttribute(name, value);
}

function showAll() {
  element("work").hidden = !images.length;
  images.forEach(showRow);
  if (selected) showSelected();
}

function showSelected() {
  const shown = texts(selected);
  for (const name of ["hc", "bpd", "ofd", "age"]) element(name).textContent = shown[name];
  element("age").classList.toggle("quiet", shown.weeks === NONE);
  const items = judge(selected, selected.pixelSizeMm).map((flag) => listItem(FLAGS[flag], "warns"));
  if (!items.length) items.push(listItem("No flag. See for yourself that the ellipse fits.", ""));
  element("flags").replaceChildren(...items);
  if (document.activeElement !== element("pixel-size")) {
    const size = selected.pixelSizeMm;
    element("pixel-size").value = size === null ? "" : Number(size.toPrecision(6));
  }
  element("pixel-size-problem").textContent = "";
  const index = images.indexOf(selected);
  element("position").textContent = `${index + 1} of ${images.length}`;
  element("previous").disabled = index === 0;
  element("next").disabled = index === images.length - 1;
}

function listItem(text, kind) {
  const item = document.createElement("li");
  item.textContent = text;
  item.className = kind;
  return item;
}

/** Adds an image's row to the table. */
function addRow(image) {
  image.row = element("rows").insertRow();
  const name = document.createElement("th");
  name.scope = "row";
  const button = document.createElement("button");
  button.type = "button";
  button.className = "link";
  button.textContent = image.name;
  button.addEventListener("click", () => select(image));
  name.append(button);
  image.row.append(name);
  for (const { textContent, className } of document.querySelectorAll("thead th + th")) {
    const cell = image.row.insertCell();
    cell.className = className;
    cell.dataset.column = textContent;
  }
  showRow(image);
}

function showRow(image) {
  const { hc, bpd, ofd, weeks } = texts(image);
  const pixelSize = image.pixelSizeMm?.toPrecision(4) ?? NONE;
  const found = judge(image, image.pixelSizeMm);
  const flags = found.map((flag) => SHORT_FLAGS[flag]).join(", ") || NONE;
  const [, ...cells] = image.row.cells;
  [hc, bpd, ofd, weeks, pixelSize, flags].forEach((text, i) => {
    cells[i].textContent = text.replace(" mm", "");
  });
  image.row.setAttribute("aria-current", String(image === selected));
}

// ---------------------------------------------------------------- the pixel size

/** Returns a number of mm as people type it, or null. */
function typedMm(text) {
  const value = Number(text.trim().replace(",", "."));
  return text.trim() && value > 0 && value < MOST_MM ? value : null;
}

function takeTypedSize() {
  const text = element("pixel-size").value;
  const size = typedMm(text);
  const wrong = size === null && text.trim() !== "";
  element("pixel-size").setAttribute("aria-invalid", String(wrong));
  if (!wrong) setPixelSize(size);
  element("pixel-size-problem").textContent = wrong
    ? `Give a number of mm between 0 and ${MOST_MM}, such as 0.12.`
    : "";
}

function setPixelSize(size) {
  if (element("for-all").checked) {
    pixelSizeOfAll = size;
    for (const image of images) image.pixelSizeMm = size;
  } else {
    selected.pixelSizeMm = size;
  }
  showAll();
}

// Ends of the scale bar, in pixels of the image, and how many of them were clicked.
const points = [
  [0, 0],
  [0, 0],
];
let clicked = 0;
let dragged = null;

function showScaleTool() {
  const { width, height } = selected;
  points[0] = [Math.round(width * 0.35), Math.round(height / 2)];
  points[1] = [Math.round(width * 0.65), Math.round(height / 2)];
  clicked = 0;
  element("scale-tool").hidden = false;
  element("scale-drawing").removeAttribute("hidden");
  element("use-scale").setAttribute("aria-expanded", "true");
  element("picture").classList.add("picking");
  element("scale-result").textContent = "";
  drawScale();
}

function hideScaleTool() {
  element("scale-tool").hidden = true;
  element("scale-drawing").setAttribute("hidden", "");
  element("use-scale").setAttribute("aria-expanded", "false");
  element("picture").classList.remove("picking");
}

function drawScale() {
  const pixels = pixelsOnScreen();
  points.forEach(([x, y], i) => {
    const handle = element(`point-${i}`);
    handle.setAttribute("transform", `translate(${x} ${y}) scale(${1 / pixels})`);
    const name = `${i ? "Second" : "First"} end of the scale bar`;
    handle.setAttribute("aria-label", `${name}: column ${x.toFixed(0)}, row ${y.toFixed(0)}`);
  });
  const [[x1, y1], [x2, y2]] = points;
  set("scale-line", { x1, y1, x2, y2 });
}

/** How many of the screen's pixels one of the image's is wide. */
function pixelsOnScreen() {
  return element("canvas").getBoundingClientRect().width / selected.width || 1;
}

function takeScale() {
  const [[x1, y1], [x2, y2]] = points;
  const pixels = Math.hypot(x2 - x1, y2 - y1);
  const distance = typedMm(element("distance").value);
  if (distance === null || pixels < 1) {
    element("scale-result").textContent = "Set both crosses, and a distance in mm.";
    return;
  }
  // No more digits than the clicks can tell.
  const size = Number((distance / pixels).toPrecision(5));
  element("scale-result").textContent =
    `${distance} mm over ${pixels.toFixed(1)} pixels: ${size} mm a pixel.`;
  element("pixel-size").value = size;
  takeTypedSize();
}

function movePoint(i, [x, y]) {
  points[i] = [clamp(x, selected.width - 1), clamp(y, selected.height - 1)];
  drawScale();
  if (clicked >= 2) takeScale();
}

function clamp(value, most) {
  return Math.min(Math.max(value, 0), most);
}

function pointOf(event) {
  const box = element("canvas").getBoundingClientRect();
  return [
    ((event.clientX - box.left) / box.width) * selected.width - 0.5,
    ((event.clientY - box.top) / box.height) * selected.height - 0.5,
  ];
}

function pointerDown(event) {
  if (element("scale-tool").hidden || event.button) return;
  event.preventDefault();
  const at = pointOf(event);
  const distances = points.map(([x, y]) => Math.hypot(x - at[0], y - at[1]));
  const nearest = distances[0] <= distances[1] ? 0 : 1;
  // The first two clicks set one end each; after that the nearer end is moved.
  dragged = clicked < 2 ? clicked : nearest;
  clicked++;
  element("picture").setPointerCapture(event.pointerId);
  element(`point-${dragged}`).focus({ preventScroll: true });
  movePoint(dragged, at);
}

function keyOnPoint(event, i) {
  const step = event.shiftKey ? 10 : 1;
  const moves = {
    ArrowLeft: [-step, 0],
    ArrowRight: [step, 0],
    ArrowUp: [0, -step],
    ArrowDown: [0, step],
  };
  const move = moves[event.key];
  if (!move) return;
  event.preventDefault();
  // Who moves a cross by keys has seen where both are.
  clicked = 2;
  movePoint(i, [points[i][0] + move[0], points[i][1] + move[1]]);
}

// ---------------------------------------------------------------- files

function download() {
  const csv = new Blob([measurementsCsv(images)], { type: "text/csv" });
  const link = document.createElement("a");
  link.href = URL.createObjectURL(csv);
  link.download = "measurements.csv";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

function clear() {
  removals++;
  images.length = 0;
  element("rows").replaceChildren();
  selected = null;
  hideScaleTool();
  showAll();
  say("");
  element("files").focus();
}

function step(by) {
  const next = images[images.indexOf(selected) + by];
  if (next) select(next);
}

// ---------------------------------------------------------------- events

element("files").addEventListener("change", (event) => {
  take(event.target.files);
  event.target.value = "";
});
for (const kind of ["dragenter", "dragover"]) {
  addEventListener(kind, (event) => {
    event.preventDefault();
    document.body.classList.add("dropping");
  });
}
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dropping");
});
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  take(event.dataTransfer.files);
});

element("previous").addEventListener("click", () => step(-1));
element("next").addEventListener("click", () => step(1));
element("picture").addEventListener("pointerdown", pointerDown);
element("picture").addEventListener("pointermove", (event) => {
  if (dragged !== null) movePoint(dragged, pointOf(event));
});
for (const kind of ["pointerup", "pointercancel"]) {
  element("picture").addEventListener(kind, () => (dragged = null));
}
for (const i of [0, 1]) {
  element(`point-${i}`).addEventListener("keydown", (event) => keyOnPoint(event, i));
}
addEventListener("resize", () => {
  if (!element("scale-tool").hidden) drawScale();
});

element("pixel-size").addEventListener("input", takeTypedSize);
element("distance").addEventListener("input", takeScale);
element("use-scale").addEventListener("click", () => {
  if (element("scale-tool").hidden) showScaleTool();
  else hideScaleTool();
});
element("show-outline").addEventListener("change", (event) =>
  element("outline").toggleAttribute("hidden", !event.target.checked),
);
element("show-ellipse").addEventListener("change", (event) =>
  element("picture").classList.toggle("without-ellipse", !event.target.checked),
);
element("enlarge").addEventListener("change", (event) => {
  element("picture").classList.toggle("enlarged", event.target.checked);
  if (!element("scale-tool").hidden) drawScale();
});
element("download").addEventListener("click", download);
element("clear").addEventListener("click", clear);
element("show-notices").addEventListener("click", async (event) => {
  event.target.remove();
  element("notices-text").hidden = false;
  element("notices-text").textContent = new TextDecoder().decode(await unpack("notices"));
});
