import { expect, test } from "vitest";
import { deed, type Press } from "./keys.ts";

const press = (key: string, held: Partial<Press> = {}): Press => ({
  key,
  ctrlKey: false,
  metaKey: false,
  altKey: false,
  getModifierState: () => false,
  ...held,
});

test.each([
  ["ArrowUp", "token"],
  ["[", "head-"],
  ["}", "layer+"],
  [",", "step-"],
  [".", "step+"],
  [" ", "play"],
  ["f", "follow"],
  ["a", "all"],
  ["Escape", "clear"],
  ["?", "help"],
  ["x", null],
])("%j does %s", (key, what) => {
  expect(deed(press(key), "div")).toBe(what);
});

test("a control keeps the keys that it needs itself", () => {
  expect(deed(press("ArrowUp"), "input:range")).toBeNull();
  expect(deed(press("."), "input:range")).toBe("step+");
  expect(deed(press(" "), "button")).toBeNull();
  expect(deed(press("ArrowDown"), "select")).toBeNull();
  expect(deed(press("."), "input:number")).toBeNull();
  expect(deed(press("["), "input:number")).toBe("head-");
});

test("the browser's own short cuts stay its own", () => {
  for (const held of ["ctrlKey", "metaKey", "altKey"]) expect(deed(press("f", { [held]: true }), "div")).toBeNull();
});

test("brackets typed with AltGr count", () => {
  const altGr = { ctrlKey: true, altKey: true, getModifierState: (name: string) => name === "AltGraph" };
  expect(deed(press("[", altGr), "div")).toBe("head-");
});
