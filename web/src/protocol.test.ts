import { existsSync, readdirSync, readFileSync } from "node:fs";
import { expect, test } from "vitest";
import { encode } from "../dev/madeup.ts";
import { decode } from "./protocol.ts";

const weight = { dtype: "F32" as const, shape: [2, 1], data: Float32Array.of(0.25, 0.1) };
const key = { dtype: "I32" as const, shape: [3], data: Int32Array.of(-1, 7, 2) };

/** A blob with exactly this header text. */
function blob(header: string, body: number[] = []): ArrayBuffer {
  const text = new TextEncoder().encode(header);
  const bytes = new Uint8Array(8 + text.length + body.length);
  new DataView(bytes.buffer).setBigUint64(0, BigInt(text.length), true);
  bytes.set(text, 8);
  bytes.set(body, 8 + text.length);
  return bytes.buffer;
}

test("facts and arrays come out as they went in", () => {
  const bytes = encode({ top: 3, note: "Ġ ▁" }, { weight, key });
  const { facts, tensors, bytes: size } = decode(bytes);
  expect(facts).toEqual({ top: 3, note: "Ġ ▁" });
  expect(tensors.get("weight")).toEqual({ shape: [2, 1], data: weight.data });
  expect(tensors.get("key")).toEqual({ shape: [3], data: key.data });
  expect(size).toBe(bytes.byteLength);
});

test("a header may end anywhere", () => {
  const entry = { w: { dtype: "F32", shape: [1], data_offsets: [0, 4] } };
  const header = JSON.stringify({ __metadata__: { facts: "{}" }, ...entry });
  for (const padding of ["", " ", "  ", "   "])
    expect(decode(blob(header + padding, [0, 0, 0x80, 0x3f])).tensors.get("w")?.data).toEqual(Float32Array.of(1));
});

test("an empty array is an array", () => {
  const none = { dtype: "F32" as const, shape: [2, 5, 0], data: new Float32Array() };
  expect(decode(encode({}, { none })).tensors.get("none")).toEqual({ shape: [2, 5, 0], data: new Float32Array() });
});

test.each([
  ["nothing", new ArrayBuffer(3), "cut off after 3 bytes"],
  ["half a header", blob("{}").slice(0, 9), "cut off after 9 bytes"],
  ["half an array", encode({}, { weight }).slice(0, -1), "Tensor weight is cut off"],
  ["no facts", blob("{}"), "The reply has no facts"],
  [
    "another dtype",
    blob(JSON.stringify({ __metadata__: { facts: "{}" }, w: { dtype: "F16", shape: [0], data_offsets: [0, 0] } })),
    "dtype F16; only F32 and I32",
  ],
])("%s is a problem that says so", (_, bytes, message) => {
  expect(() => decode(bytes)).toThrow(message);
});

const golden = new URL("../../tests/golden/", import.meta.url);
const names = existsSync(golden) ? readdirSync(golden).filter((name) => name.endsWith(".safetensors")) : [];

test.each(names.map((name) => [name]))("Python's %s can be read", (name) => {
  const { facts, tensors } = decode(readFileSync(new URL(name, golden)).slice().buffer);
  expect(typeof facts).toBe("object");
  for (const { shape, data } of tensors.values()) expect(data.length).toBe(shape.reduce((a, b) => a * b, 1));
});
