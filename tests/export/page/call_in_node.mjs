// Calls functions of one of the page's modules, for test_page.py.
//
//   node call_in_node.mjs MODULE_JS CALLS_JSON
//
// CALLS_JSON holds [[function, argument, ...], ...]. An argument {file, type, width, height} is a
// map whose values lie in that file, and {asMap} is a Map; the values of maps that are returned are
// written to result_NUMBER.bin beside CALLS_JSON. Prints the results as JSON.
import { readFileSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { pathToFileURL } from "node:url";

const [modulePath, callsPath] = process.argv.slice(2);
const module = await import(pathToFileURL(modulePath));
const types = { uint8: Uint8Array, float32: Float32Array };

const read = (argument) => {
  if (argument?.asMap) return new Map(argument.asMap);
  if (!argument?.file) return argument;
  const { buffer, byteOffset, byteLength } = readFileSync(argument.file);
  const data = new types[argument.type](buffer.slice(byteOffset, byteOffset + byteLength));
  return { data, width: argument.width, height: argument.height };
};
let written = 0;
const write = (_, value) => {
  if (value instanceof Map) return Object.fromEntries(value);
  if (!ArrayBuffer.isView(value)) return value;
  const file = join(dirname(callsPath), `result_${written++}.bin`);
  writeFileSync(file, value);
  return file;
};
const results = JSON.parse(readFileSync(callsPath)).map(([name, ...values]) =>
  module[name](...values.map(read)),
);
console.log(JSON.stringify(results, write));
