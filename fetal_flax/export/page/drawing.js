// Masks as lines.

/**
 * Returns an SVG path around every part and hole of a mask, along the edges of its pixels.
 *
 * The edges run so that the mask lies to their right. From each corner that they reach, the path
 * goes on along an edge that begins there.
 */
export function outlinePath({ data, width, height }) {
  const inside = (x, y) => x >= 0 && y >= 0 && x < width && y < height && data[y * width + x] === 1;
  // By the corner where an edge begins, the corners where edges end; corners are numbered by rows.
  const corners = width + 1;
  const edges = new Map();
  const add = (x1, y1, x2, y2) => {
    const from = y1 * corners + x1;
    if (!edges.has(from)) edges.set(from, []);
    edges.get(from).push(y2 * corners + x2);
  };
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      if (data[y * width + x] !== 1) continue;
      if (!inside(x, y - 1)) add(x, y, x + 1, y);
      if (!inside(x + 1, y)) add(x + 1, y, x + 1, y + 1);
      if (!inside(x, y + 1)) add(x + 1, y + 1, x, y + 1);
      if (!inside(x - 1, y)) add(x, y + 1, x, y);
    }
  }
  const position = (corner) => [(corner % corners) - 0.5, Math.floor(corner / corners) - 0.5];
  let path = "";
  for (const [start, ends] of edges) {
    while (ends.length) {
      path += `M${position(start).join(" ")}`;
      for (let corner = ends.pop(); corner !== start; corner = edges.get(corner).pop()) {
        path += `L${position(corner).join(" ")}`;
      }
      path += "Z";
    }
  }
  return path;
}
