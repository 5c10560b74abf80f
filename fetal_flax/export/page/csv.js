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

/**
 * Returns pixel sizes in mm by file name, from a CSV with the columns `filename` and
 * `pixel size(mm)`.
 *
 * Throws an Error that says what is wrong with it.
 */
export function readPixelSizes(text) {
  const [header, ...lines] = text
    .replace(/^\uFEFF/, "")
    .split(/\r?\n/)
    .filter((line) => line.trim())
    .map((line) => line.split(",").map((value) => value.trim().replace(/^"(.*)"$/, "$1")));
  const [name, size] = ["filename", "pixel size(mm)"].map((title) => header?.indexOf(title) ?? -1);
  if (name < 0 || size < 0) {
    throw new Error("has no columns filename and pixel size(mm): name them so in its first line");
  }
  const sizes = new Map();
  for (const line of lines) {
    const value = Number(line[size]);
    if (!(value > 0 && value < MOST_MM)) {
      throw new Error(`gives ${line[name]} the pixel size ${line[size]}: give a number of mm`);
    }
    sizes.set(line[name], value);
  }
  return sizes;
}
