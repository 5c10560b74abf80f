// The network in the page: unpacks it and its runtime, and runs it. Nothing is fetched; all bytes
// are in the page's own text.

/** Returns the bytes of a data block of the page, which leaves the page with that. */
function takeBytes(id) {
  const block = document.getElementById(id);
  const text = block.textContent.trim();
  block.remove();
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  return bytes;
}

/** Returns the bytes of a data block that was packed by gzip. */
export async function unpack(id) {
  const packed = new Blob([takeBytes(id)]).stream();
  const stream = packed.pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/**
 * Starts the runtime with the network.
 *
 * Returns a function that takes a grey image at the network's size and gives the logits, before
 * the sigmoid.
 */
export async function startNetwork({ channels }) {
  const [library, wasm, model] = await Promise.all(["library", "wasm", "network"].map(unpack));
  const address = URL.createObjectURL(new Blob([library], { type: "text/javascript" }));
  const ort = await import(address);
  URL.revokeObjectURL(address);
  // Threads need a server that isolates the page; here it may be a file.
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmBinary = wasm.buffer;
  const session = await ort.InferenceSession.create(model, { executionProviders: ["wasm"] });

  return async ({ data, width, height }) => {
    const planes = new Uint8Array(channels * data.length);
    for (let i = 0; i < channels; i++) planes.set(data, i * data.length);
    const image = new ort.Tensor("uint8", planes, [1, channels, height, width]);
    const { logits } = await session.run({ image });
    return { data: logits.data, width, height };
  };
}
