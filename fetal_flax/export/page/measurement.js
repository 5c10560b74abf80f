// The measurement of fetal_flax in JavaScript: from an image's grey values to the network's input,
// and from its logits to the head, its ellipse, millimetres, flags and gestational age.
//
// Each function does what the Python function of the same name does (fetal_flax/measurement,
// fetal_flax/inference/assessment.py, fetal_flax/data/images.py), and tests/export/test_page.py
// holds the two together. No DOM, so that node can run it.
//
// A map is {data, width, height} with its values row by row; a mask's values are 0 and 1.
// x runs right, y runs down, pixel centres lie at integers.

export const MAX_PIXELS = 2 ** 25;
export const SMALLEST_SIDE_PX = 16;
export const MOST_MM = 1000;

const POINTS_OF_A_FIT = 6;
const LEAST_ELLIPSE_AGREEMENT = 0.98;
const LEAST_CONFIDENCE = 0.92;
const LARGEST_SPREAD_MM = 12;
const PLAUSIBLE_HC_MM = [30, 450];

const HADLOCK_RANGE_MM = [68.0, 360.0];
const HADLOCK_GROUPS_MM = [147.5, 221.5, 282.0, 326.5];
const HADLOCK_TWO_SD_WEEKS = [1.19, 1.48, 2.06, 2.98, 3.2];

// ---------------------------------------------------------------- images

/** Returns grey values of RGBA ones, with OpenCV's luma; the alpha channel is dropped. */
export function luma(rgba, width, height) {
  const data = new Uint8Array(width * height);
  for (let i = 0; i < data.length; i++) {
    const [red, green, blue] = [rgba[4 * i], rgba[4 * i + 1], rgba[4 * i + 2]];
    // 0.299, 0.587 and 0.114, in 2^-15.
    data[i] = (9798 * red + 19235 * green + 3735 * blue + 16384) >> 15;
  }
  return { data, width, height };
}

/**
 * For each new pixel of a side: the old pixels before and after it, and how far it lies from the
 * first. At the image's ends both are the same pixel.
 */
function linearPositions(newSize, oldSize) {
  const scale = 1 / (newSize / oldSize);
  const before = new Int32Array(newSize);
  const after = new Int32Array(newSize);
  const fraction = new Float32Array(newSize);
  for (let i = 0; i < newSize; i++) {
    const position = (i + 0.5) * scale - 0.5;
    const floor = Math.floor(position);
    before[i] = Math.max(floor, 0);
    after[i] = Math.min(floor + 1, oldSize - 1);
    fraction[i] = position - floor;
  }
  return { before, after, fraction };
}

/** Rounds as OpenCV does: halves to the even neighbour. */
function roundHalfEven(value) {
  const floor = Math.floor(value);
  const rest = value - floor;
  if (rest !== 0.5) return Math.round(value);
  return floor % 2 === 0 ? floor : floor + 1;
}

/**
 * Resizes a grey image bilinearly to what OpenCV gives, grey level by grey level: weights are
 * multiples of 1/2048, and an image that is halved is averaged.
 */
export function resizeImage(image, height, width) {
  const data = new Uint8Array(width * height);
  const old = image.data;
  if (image.width === 2 * width && image.height === 2 * height) {
    for (let y = 0; y < height; y++) {
      for (let x = 0; x < width; x++) {
        const i = 2 * y * image.width + 2 * x;
        const sum = old[i] + old[i + 1] + old[i + image.width] + old[i + image.width + 1];
        data[y * width + x] = (sum + 2) >> 2;
      }
    }
    return { data, width, height };
  }
  const columns = linearPositions(width, image.width);
  const rows = linearPositions(height, image.height);
  const weight = (fraction) => roundHalfEven(fraction * 2048);
  const near = (fraction) => weight(Math.fround(1 - fraction));
  const rowAt = (y, x) =>
    old[y * image.width + columns.before[x]] * near(columns.fraction[x]) +
    old[y * image.width + columns.after[x]] * weight(columns.fraction[x]);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const upper = (near(rows.fraction[y]) * (rowAt(rows.before[y], x) >> 4)) >> 16;
      const lower = (weight(rows.fraction[y]) * (rowAt(rows.after[y], x) >> 4)) >> 16;
      data[y * width + x] = (upper + lower + 2) >> 2;
    }
  }
  return { data, width, height };
}

/** Returns the mask at the image's own size: logits resized bilinearly, then above 0. */
export function nativeMask(logits, height, width) {
  const columns = linearPositions(width, logits.width);
  const rows = linearPositions(height, logits.height);
  const data = new Uint8Array(width * height);
  const stretched = new Float32Array(logits.height * width);
  for (let y = 0; y < logits.height; y++) {
    const row = y * logits.width;
    for (let x = 0; x < width; x++) {
      const far = columns.fraction[x];
      stretched[y * width + x] =
        Math.fround(logits.data[row + columns.before[x]] * Math.fround(1 - far)) +
        Math.fround(logits.data[row + columns.after[x]] * far);
    }
  }
  for (let y = 0; y < height; y++) {
    const far = rows.fraction[y];
    const near = Math.fround(1 - far);
    const [above, below] = [rows.before[y] * width, rows.after[y] * width];
    for (let x = 0; x < width; x++) {
      data[y * width + x] = stretched[above + x] * near + stretched[below + x] * far > 0 ? 1 : 0;
    }
  }
  return { data, width, height };
}

// ---------------------------------------------------------------- regions

/**
 * Labels what is connected by sides, from 1 in the order of the first pixels, row by row.
 * Returns the label of each pixel and the number of pixels of each label, of 0 first.
 */
function label(data, width, height) {
  const labels = new Int32Array(data.length);
  const counts = [0];
  const stack = new Int32Array(data.length);
  let waiting = 0;
  const reach = (i, own) => {
    if (!data[i] || labels[i]) return;
    labels[i] = own;
    stack[waiting++] = i;
  };
  for (let start = 0; start < data.length; start++) {
    if (!data[start] || labels[start]) continue;
    const own = counts.length;
    counts.push(0);
    reach(start, own);
    while (waiting) {
      const i = stack[--waiting];
      counts[own]++;
      const x = i % width;
      if (x > 0) reach(i - 1, own);
      if (x < width - 1) reach(i + 1, own);
      if (i >= width) reach(i - width, own);
      if (i < width * (height - 1)) reach(i + width, own);
    }
  }
  return { labels, counts };
}

/** Returns the largest connected region, its holes filled, and how many regions there are. */
export function largestRegion(mask) {
  const { width, height } = mask;
  const { labels, counts } = label(mask.data, width, height);
  let largest = 0;
  for (let i = 1; i < counts.length; i++) {
    if (!largest || counts[i] > counts[largest]) largest = i;
  }
  if (!largest) return { region: mask, components: 0 };
  const region = fillHoles({ data: labels.map((own) => own === largest), width, height });
  return { region, components: counts.length - 1 };
}

/** Returns the region with its holes: pixels from which no way leads out of the image. */
export function fillHoles(region) {
  const { width, height } = region;
  // A frame, from which all background that is no hole can be reached.
  const [w, h] = [width + 2, height + 2];
  const background = new Uint8Array(w * h).fill(1);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      background[(y + 1) * w + x + 1] = region.data[y * width + x] ? 0 : 1;
    }
  }
  const { labels } = label(background, w, h);
  const data = new Uint8Array(width * height);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      data[y * width + x] = labels[(y + 1) * w + x + 1] === 1 ? 0 : 1;
    }
  }
  return { data, width, height };
}

/**
 * Returns the midpoints [x, y] of the edges between the region's pixels and others, and whether
 * the region reaches the image's border, where no edge can be seen.
 */
export function edgePoints(region) {
  const { data, width, height } = region;
  const [horizontal, vertical] = [[], []];
  let touchesBorder = false;
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const i = y * width + x;
      if (y + 1 < height && data[i] !== data[i + width]) horizontal.push([x, y + 0.5]);
      if (x + 1 < width && data[i] !== data[i + 1]) vertical.push([x + 0.5, y]);
      const onBorder = x === 0 || y === 0 || x === width - 1 || y === height - 1;
      touchesBorder ||= onBorder && data[i] === 1;
    }
  }
  return { points: [...horizontal, ...vertical], touchesBorder };
}

// ---------------------------------------------------------------- the ellipse

/**
 * Solves a linear least-squares problem by the singular value decomposition of its columns
 * (one-sided Jacobi: columns are rotated in pairs until they are at right angles).
 * Returns the solution and the singular values, falling.
 */
function leastSquares(columns, target) {
  const count = columns.length;
  const u = columns.map((column) => Float64Array.from(column));
  const v = columns.map((_, i) => columns.map((_, j) => (i === j ? 1 : 0)));
  const dot = (a, b) => {
    let sum = 0;
    for (let i = 0; i < a.length; i++) sum += a[i] * b[i];
    return sum;
  };
  const rotate = (a, b, cos, sin) => {
    for (let i = 0; i < a.length; i++) {
      const turned = cos * a[i] - sin * b[i];
      b[i] = sin * a[i] + cos * b[i];
      a[i] = turned;
    }
  };
  for (let sweep = 0, rotated = true; rotated && sweep < 60; sweep++) {
    rotated = false;
    for (let p = 0; p < count - 1; p++) {
      for (let q = p + 1; q < count; q++) {
        const [pp, qq, pq] = [dot(u[p], u[p]), dot(u[q], u[q]), dot(u[p], u[q])];
        if (Math.abs(pq) <= 1e-13 * Math.sqrt(pp * qq)) continue;
        rotated = true;
        const zeta = (qq - pp) / (2 * pq);
        const tan = (zeta < 0 ? -1 : 1) / (Math.abs(zeta) + Math.hypot(1, zeta));
        const cos = 1 / Math.hypot(1, tan);
        rotate(u[p], u[q], cos, cos * tan);
        rotate(v[p], v[q], cos, cos * tan);
      }
    }
  }
  const singular = u.map((column) => Math.sqrt(dot(column, column)));
  const negligible = 2 * Number.EPSILON * singular.reduce((sum, value) => sum + value, 0);
  const solution = new Array(count).fill(0);
  singular.forEach((value, j) => {
    if (value <= negligible) return;
    const share = dot(u[j], target) / value / value;
    for (let i = 0; i < count; i++) solution[i] += share * v[j][i];
  });
  return { solution, singular: singular.sort((a, b) => b - a) };
}

/**
 * Returns the ellipse through points by least squares, or null where they give none.
 *
 * As OpenCV's fitEllipse: a conic fitted to the points gives the centre, a second one around that
 * centre the axes.
 */
export function fitEllipse(points) {
  const count = points.length;
  if (count < POINTS_OF_A_FIT) return null;
  const mean = (k) => points.reduce((sum, point) => sum + point[k], 0) / count;
  const [middleX, middleY] = [mean(0), mean(1)];
  const spread = points.reduce(
    (sum, [x, y]) => sum + Math.abs(x - middleX) + Math.abs(y - middleY),
    0,
  );
  const scale = 100 / Math.max(spread, 2 ** -23);

  const firstConic = (shift) => {
    const x = points.map((point, i) => (point[0] - middleX + shift * (i & 1 ? 1 : -1)) * scale);
    const y = points.map((point, i) => (point[1] - middleY + shift * (i & 2 ? 1 : -1)) * scale);
    const terms = [
      x.map((value) => -value * value),
      y.map((value) => -value * value),
      x.map((value, i) => -value * y[i]),
      x,
      y,
    ];
    return { x, y, ...leastSquares(terms, new Array(count).fill(10000)) };
  };
  let conic = firstConic(0);
  if (conic.singular[0] * 2 ** -23 > conic.singular[4]) {
    // Points on a line, or on two, fit many conics: shaken a little, they fit one.
    conic = firstConic((spread / (2 * count)) * 1e-3);
  }
  const { x, y } = conic;
  const [a, b, c, d, e] = conic.solution;
  const center = leastSquares(
    [
      [2 * a, c],
      [c, 2 * b],
    ],
    [d, e],
  ).solution;
  const around = [
    x.map((value) => (value - center[0]) ** 2),
    y.map((value) => (value - center[1]) ** 2),
    x.map((value, i) => (value - center[0]) * (y[i] - center[1])),
  ];
  const [xx, yy, xy] = leastSquares(around, new Array(count).fill(1)).solution;

  const turn = -0.5 * Math.atan2(xy, yy - xx);
  const difference = Math.abs(xy) > 1e-8 ? xy / Math.sin(-2 * turn) : yy - xx;
  const semiAxis = (sum) => (sum > 1e-8 ? Math.sqrt(2 / sum) : sum) / scale;
  const first = semiAxis(Math.abs(xx + yy - difference));
  const second = semiAxis(Math.abs(xx + yy + difference));
  const numbers = [center[0], center[1], first, second, turn];
  if (!numbers.every(Number.isFinite) || Math.min(first, second) <= 0) return null;
  const angle = first >= second ? turn : turn + Math.PI / 2;
  return {
    centerX: center[0] / scale + middleX,
    centerY: center[1] / scale + middleY,
    semiMajor: Math.max(first, second),
    semiMinor: Math.min(first, second),
    angle: modulo(angle + Math.PI / 2, Math.PI) - Math.PI / 2,
  };
}

function modulo(value, divisor) {
  return ((value % divisor) + divisor) % divisor;
}

/** Circumference in pixels, by the complete elliptic integral of the second kind. */
export function circumference({ semiMajor, semiMinor }) {
  // Arithmetic-geometric mean: E/K is 1 minus a sum over the differences on the way.
  let [a, b] = [1, semiMinor / semiMajor];
  let sum = (1 - b * b) / 2;
  for (let power = 1; Math.abs(a - b) > 1e-15 * a; power *= 2) {
    const difference = (a - b) / 2;
    [a, b] = [(a + b) / 2, Math.sqrt(a * b)];
    sum += power * difference * difference;
  }
  return 4 * semiMajor * (Math.PI / (2 * a)) * (1 - sum);
}

/** Draws the ellipse: 1 where the centre of the pixel is inside. */
export function filled(ellipse, height, width) {
  const data = new Uint8Array(width * height);
  const [cos, sin] = [Math.cos(ellipse.angle), Math.sin(ellipse.angle)];
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const [dx, dy] = [x - ellipse.centerX, y - ellipse.centerY];
      const u = (dx * cos + dy * sin) / ellipse.semiMajor;
      const v = (dy * cos - dx * sin) / ellipse.semiMinor;
      data[y * width + x] = u * u + v * v <= 1 ? 1 : 0;
    }
  }
  return { data, width, height };
}

/** Dice of two masks, in [0, 1]. */
function dice(prediction, truth) {
  let [intersection, total] = [0, 0];
  for (let i = 0; i < truth.data.length; i++) {
    intersection += prediction.data[i] & truth.data[i];
    total += prediction.data[i] + truth.data[i];
  }
  return total ? (2 * intersection) / total : 1;
}

// ---------------------------------------------------------------- the head

/** Measures the head in a mask at native size, in pixels; null where there is none. */
export function measureHead(mask, outlinePx) {
  const { region, components } = largestRegion(mask);
  const { points, touchesBorder } = edgePoints(region);
  const edgeEllipse = fitEllipse(points);
  if (edgeEllipse === null || edgeEllipse.semiMinor <= outlinePx) return null;
  const ellipse = {
    ...edgeEllipse,
    semiMajor: edgeEllipse.semiMajor - outlinePx,
    semiMinor: edgeEllipse.semiMinor - outlinePx,
  };
  const ellipseAgreement = dice(filled(edgeEllipse, mask.height, mask.width), region);
  return { ellipse, edgeEllipse, touchesBorder, components, ellipseAgreement };
}

/** Returns a head's size in mm: circumference, biparietal and occipitofrontal diameter. */
export function inMm(head, pixelSizeMm) {
  return {
    hcMm: circumference(head.ellipse) * pixelSizeMm,
    bpdMm: 2 * head.ellipse.semiMinor * pixelSizeMm,
    ofdMm: 2 * head.ellipse.semiMajor * pixelSizeMm,
  };
}

/** Dice of the thresholded mask with the network's probabilities in the truth's place. */
export function expectedDice(logits) {
  let [shared, probabilities, pixels] = [0, 0, 0];
  for (const logit of logits.data) {
    const probability = 1 / (1 + Math.exp(-logit));
    probabilities += probability;
    if (logit > 0) {
      shared += probability;
      pixels++;
    }
  }
  return (2 * shared) / (probabilities + pixels);
}

/** How far the circumference depends on where the head ends: of 0.1 to 0.9, as a share of 0.5's. */
export function sizeSpread(logits) {
  const [outer, edge, inner] = [0.1, 0.5, 0.9].map((probability) => {
    const least = Math.log(probability / (1 - probability));
    return Math.sqrt(logits.data.reduce((count, logit) => count + (logit > least ? 1 : 0), 0));
  });
  return edge ? (outer - inner) / edge : 0;
}

/**
 * Returns the flags that say why a person should look: of what `assess` returned, with the pixel
 * size, or null.
 */
export function judge({ head, confidence, spread, covered }, pixelSizeMm) {
  if (head === null) return [covered ? "covers_image" : "no_head"];
  // Without a pixel size it is as plausible, and as certain, as any.
  const hcMm = pixelSizeMm === null ? null : inMm(head, pixelSizeMm).hcMm;
  const [least, most] = PLAUSIBLE_HC_MM;
  const signs = {
    implausible_size: hcMm !== null && !(least <= hcMm && hcMm <= most),
    uncertain_size: hcMm !== null && hcMm * spread > LARGEST_SPREAD_MM,
    touches_border: head.touchesBorder,
    several_components: head.components > 1,
    low_ellipse_agreement: head.ellipseAgreement < LEAST_ELLIPSE_AGREEMENT,
    low_confidence: confidence < LEAST_CONFIDENCE,
  };
  return Object.keys(signs).filter((name) => signs[name]);
}

/**
 * Assesses an image from the network's logits: its mask at native size, its head, and what `judge`
 * needs beside them.
 */
export function assess(logits, height, width, outlinePx) {
  const mask = nativeMask(logits, height, width);
  const head = measureHead(mask, outlinePx);
  const components = head?.components ?? largestRegion(mask).components;
  return {
    mask,
    head,
    components,
    confidence: expectedDice(logits),
    spread: sizeSpread(logits),
    covered: logits.data.every((logit) => logit > 0),
  };
}

/** Returns gestational age and its range in weeks (Hadlock 1984), or null outside the table. */
export function gestationalAge(circumferenceMm) {
  const [least, most] = HADLOCK_RANGE_MM;
  if (!(least <= circumferenceMm && circumferenceMm <= most)) return null;
  const cm = circumferenceMm / 10;
  const weeks = 8.96 + 0.54 * cm + 0.0003 * cm ** 3;
  const group = HADLOCK_GROUPS_MM.filter((end) => circumferenceMm >= end).length;
  const twoSd = HADLOCK_TWO_SD_WEEKS[group];
  return { weeks, low: weeks - twoSd, high: weeks + twoSd };
}
