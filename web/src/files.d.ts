declare module "*.css" {
  const text: string;
  export default text;
}

declare module "node:fs" {
  export function existsSync(path: URL): boolean;
  export function readdirSync(path: URL): string[];
  export function readFileSync(path: URL): Uint8Array<ArrayBuffer>;
}
