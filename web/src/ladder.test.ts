import { readdirSync, readFileSync } from "node:fs";
import { expect, test } from "vitest";

/** From the ground up; a module imports from lower rungs only. */
const RUNGS = [
  ["protocol", "colour", "keys"],
  ["source", "lines", "words"],
  ["draw", "replies"],
  ["state"],
  ["side", "weight"],
  ["examples", "header", "help", "numbers", "pickers", "picture", "spoken", "time"],
  ["app"],
  ["main"],
];

const rung = (module: string) => RUNGS.findIndex((modules) => modules.includes(module));
const here = new URL("./", import.meta.url);
const modules = readdirSync(here).filter((name) => /\.tsx?$/.test(name) && !/\.(test|d)\.ts$/.test(name));

/** The neighbours that a source imports. */
function imports(source: string): string[] {
  return [...source.matchAll(/from "\.\/([a-z]+)\.tsx?"/g)].map(([, name]) => name);
}

test("every module has its rung", () => {
  expect(modules.map((name) => name.replace(/\.tsx?$/, "")).sort()).toEqual(RUNGS.flat().sort());
});

test.each(modules.map((name) => [name]))("%s imports from below", (name) => {
  const source = new TextDecoder().decode(readFileSync(new URL(name, here)));
  const above = imports(source).filter((each) => rung(each) >= rung(name.replace(/\.tsx?$/, "")));
  expect(above).toEqual([]);
});

test("an import that leads up would be seen", () => {
  expect(imports('import { App } from "./app.tsx";\nimport type {\n  State,\n} from "./state.ts";')).toEqual([
    "app",
    "state",
  ]);
});
