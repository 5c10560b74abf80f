// Image files to grey values, as the browser decodes them.

import { MAX_PIXELS, SMALLEST_SIDE_PX, luma } from "./measurement.js";

/** Decodes an image without adapting its colours to the screen. */
export function decode(file) {
  return createImageBitmap(file, { colorSpaceConversion: "none" });
}

/**
 * Returns a file's grey values.
 *
 * Throws an Error that says what is wrong with the file.
 */
export async function readGray(file) {
  let bitmap;
  try {
    bitmap = await decode(file);
  } catch {
    throw new Error("is no image that this browser can read: give PNG or JPEG");
  }
  const { width, height } = bitmap;
  try {
    if (width * height > MAX_PIXELS) {
      throw new Error(`has more than ${MAX_PIXELS.toLocaleString("en")} pixels: crop or shrink it`);
    }
    if (Math.min(width, height) < SMALLEST_SIDE_PX) {
      throw new Error(`has ${width}×${height} pixels, too few to show a head: give the whole image`);
    }
    const rgba = pixels(bitmap);
    await checkPixels(rgba, file);
    return luma(rgba, width, height);
  } finally {
    bitmap.close();
  }
}

/** Refuses images whose grey values the browser has not given as they are in the file. */
async function checkPixels(rgba, file) {
  let [largest, opaque] = [0, true];
  for (let i = 0; i < rgba.length; i++) {
    if (i % 4 === 3) opaque &&= rgba[i] === 255;
    else if (rgba[i] > largest) largest = rgba[i];
  }
  if (!opaque) {
    throw new Error("has transparent pixels, whose grey a browser loses: save it without them");
  }
  // Python scales values of 8 to 14 bits that a device has put into 16; here they are nearly black.
  if (largest < 64 && (await isPngOf16Bits(file))) {
    throw new Error("holds fewer bits in 16, which a browser shows black: save it with 8 bits");
  }
}

async function isPngOf16Bits(file) {
  const head = new Uint8Array(await file.slice(0, 25).arrayBuffer());
  return String.fromCharCode(...head.slice(1, 4)) === "PNG" && head[24] === 16;
}

function pixels(bitmap) {
  const canvas = document.createElement("canvas");
  canvas.width = bitmap.width;
  canvas.height = bitmap.height;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  if (!context) throw new Error("is too large for this browser: crop or shrink it");
  context.drawImage(bitmap, 0, 0);
  return context.getImageData(0, 0, bitmap.width, bitmap.height).data;
}

/**
 * Returns whether the page reads the pixels that it draws. Some browsers change them a little, so
 * that pages can't recognise a visitor; a measurement would change with them.
 */
export async function pixelsAreTrue() {
  const drawn = new ImageData(64, 64);
  for (let i = 0; i < drawn.data.length; i++) drawn.data[i] = i % 4 === 3 ? 255 : (i * 37) % 251;
  const read = pixels(await createImageBitmap(drawn));
  return drawn.data.every((value, i) => value === read[i]);
}
