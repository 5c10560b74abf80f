// Tables in and out, as the command line has them.

import { MOST_MM, gestationalAge, inMm, judge } from "./measurement.js";

/** Columns of measurements.csv that `fetal-flax predict` writes too; docs/measurement.md. */
const MEASUREMENTS = [
  "name",
  "hc_mm",
  "bpd_mm",
  "ofd_mm",
  "ga_weeks",
  "ga_low_weeks",
  "ga_high_weeks",
  "pixel_size_mm",
  "center_x_px",
  "center_y_px",
  "semi_major_px",
  "semi_minor_px",
  "angle_rad",
  "touches_border",
  "components",
  "ellipse_agreement",
  "confidence",
  "flags",
];

const COLUMNS = ["filename", "pixel size(mm)"];
const SEPARATORS = [",", ";", "\t", "|"];
const BLANKS = /^[ \t\0\uFEFF\xA0]+|[ \t\0\uFEFF\xA0]+$/g;
// A decimal comma is none of thousands: no pixel is that large.
const NUMBER = /^([-+]?(?:\d+(?:[.,]\d*)?|[.,]\d+)(?:e[-+]?\d+)?) ?(?:mm)?$/i;

/** Returns the measurements of images as CSV, numbers with all their digits. */
export function measurementsCsv(images) {
  const lines = images.map((image) => {
    const values = measurementsOf(image);
    return MEASUREMENTS.map((column) => cell(values[column] ?? "")).join(",");
  });
  return `${[MEASUREMENTS.join(","), ...lines].join("\n")}\n`;
}

function measurementsOf(image) {
  const { name, head, pixelSizeMm, components, confidence } = image;
  const flags = judge(image, pixelSizeMm).join(" ");
  const values = { name: name.replace(/\.[^.]*$/, ""), confidence, components, flags };
  values.pixel_size_mm = pixelSizeMm;
  if (!head) return values;
  Object.assign(values, {
    center_x_px: head.ellipse.centerX,
    center_y_px: head.ellipse.centerY,
    semi_major_px: head.ellipse.semiMajor,
    semi_minor_px: head.ellipse.semiMinor,
    angle_rad: head.ellipse.angle,
    touches_border: head.touchesBorder ? "True" : "False",
    ellipse_agreement: head.ellipseAgreement,
  });
  if (pixelSizeMm === null) return values;
  const { hcMm, bpdMm, ofdMm } = inMm(head, pixelSizeMm);
  const { weeks, low, high } = gestationalAge(hcMm) ?? {};
  const inTime = { ga_weeks: weeks, ga_low_weeks: low, ga_high_weeks: high };
  return Object.assign(values, { hc_mm: hcMm, bpd_mm: bpdMm, ofd_mm: ofdMm, ...inTime });
}

function cell(value) {
  let text = String(value);
  // A spreadsheet would compute a name that begins like a formula.
  if (typeof value === "string" && /^[=+\-@\t\r]/.test(text)) text = `'${text}`;
  return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

/** Returns a CSV's text: UTF-16 with its mark, UTF-8, or else Windows-1252. */
export function decodeText(bytes) {
  const data = Uint8Array.from(bytes);
  const begins = (...start) => start.every((byte, i) => data[i] === byte);
  if (begins(0x50, 0x4b, 3, 4)) throw new Error("is an Excel workbook: save it as CSV");
  if (begins(0xff, 0xfe)) return new TextDecoder("utf-16le").decode(data);
  if (begins(0xfe, 0xff)) return new TextDecoder("utf-16be").decode(data);
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(data);
  } catch {
    return new TextDecoder("windows-1252").decode(data);
  }
}

/**
 * Returns what a CSV says of each file, by name: {size} in mm, or {problem}, a sentence.
 *
 * It reads what fetal_flax/data/hc18/measurements.py reads, whose rules these are. Throws an Error
 * that says which column isn't there.
 */
export function readPixelSizes(text, csvName) {
  let separators = SEPARATORS;
  for (;;) {
    const [line] = text.match(/^[^\r\n]*(\r\n|\r|\n)?/);
    const named = line.match(/^sep=([^\r\n])/);
    if (named) separators = [named[1]];
    const isHeader = !/^(#|sep=)/.test(line) && /[^ \t\0\uFEFF\xA0\r\n,;|"]/.test(line);
    if (isHeader || !line) break;
    text = text.slice(line.length);
  }
  const tables = separators.map((separator) => parse(text, separator));
  const table = tables.find(([header]) => places(header).every((at) => at >= 0));
  if (!table) {
    const [[header]] = tables.sort(([a], [b]) => b.length - a.length);
    const lacking = COLUMNS.filter((_, i) => places(header)[i] < 0);
    throw new Error(
      `has no column ${lacking.join(" and ")}: its first row is ${header.slice(0, 10).join(", ")}`,
    );
  }
  const [header, ...lines] = table;
  const [nameAt, sizeAt] = places(header);
  const texts = new Map();
  const found = new Map();
  for (const cells of lines) {
    const [name, size] = [cells[nameAt] ?? "", cells[sizeAt] ?? ""];
    if (!name) continue;
    const value = Number(size.match(NUMBER)?.[1].replace(",", "."));
    let problem = found.get(name)?.problem;
    if (!(value > 0 && value < MOST_MM)) {
      problem ??= `has ${size || "nothing"} as its pixel size in ${csvName}: give a number of mm`;
    }
    if ((texts.get(name) ?? size) !== size) problem ??= `has two rows in ${csvName}: remove one`;
    // Such as a decimal comma between commas.
    if (cells.slice(header.length).some(Boolean)) {
      problem ??= `has more cells than the header in ${csvName}: take semicolons between them`;
    }
    texts.set(name, size);
    found.set(name, problem ? { problem } : { size: value });
  }
  return found;
}

/**
 * Returns what was read of a file: under its name, or under one in another case, composition or
 * folder, where there is just one.
 */
export function findRow(rows, name) {
  if (rows.has(name)) return rows.get(name);
  const alike = [...rows.keys()].filter((other) => likeness(other) === likeness(name));
  return alike.length === 1 ? rows.get(alike[0]) : undefined;
}

function likeness(name) {
  return name.split(/[/\\]/).at(-1).normalize("NFC").toLowerCase();
}

/** Returns the cells of each row, without blanks around them. */
function parse(text, separator) {
  const rows = [];
  let [row, cell, quoted] = [[], "", false];
  const endCell = () => {
    row.push(cell.replace(BLANKS, ""));
    cell = "";
  };
  for (let i = 0; i < text.length; i++) {
    const character = text[i];
    if (quoted) {
      const doubled = character === '"' && text[i + 1] === '"';
      if (character !== '"' || doubled) cell += character;
      else quoted = false;
      if (doubled) i++;
    } else if (character === '"' && !cell) {
      quoted = true;
    } else if (character === separator) {
      endCell();
    } else if (character === "\n" || character === "\r") {
      endCell();
      rows.push(row);
      row = [];
    } else {
      cell += character;
    }
  }
  endCell();
  return [...rows, row];
}

/** Returns where each column is, once, under its own name or one like it; -1 where it isn't. */
function places(header) {
  const plain = (name) => name.replace(/[\s()[\]_.-]/g, "").toLowerCase();
  const once = (names, name) =>
    names.filter((other) => other === name).length === 1 ? names.indexOf(name) : -1;
  return COLUMNS.map((column) => {
    const exact = once(header, column);
    return exact >= 0 ? exact : once(header.map(plain), plain(column));
  });
}
