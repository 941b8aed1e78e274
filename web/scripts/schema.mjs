// Makes src/lib/schema.d.ts from openapi/openapi.json. With --check it only compares, and fails when they have drifted apart.
// The generator needs TypeScript 5 and lives in a folder of its own.
import { execFileSync } from 'node:child_process'
import { existsSync, mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

const web = new URL('..', import.meta.url).pathname
const tools = join(web, 'tools')
const source = join(web, '../openapi/openapi.json')
const target = join(web, 'src/lib/schema.d.ts')
if (!existsSync(source)) {
  console.error('openapi/openapi.json is missing: run `./dev openapi` first')
  process.exit(1)
}
if (!existsSync(join(tools, 'node_modules'))) execFileSync('npm', ['ci'], { cwd: tools, stdio: 'inherit' })

const check = process.argv.includes('--check')
const scratch = check ? mkdtempSync(join(tmpdir(), 'clawhq-schema-')) : undefined
const out = scratch ? join(scratch, 'schema.d.ts') : target
try {
  execFileSync(join(tools, 'node_modules/.bin/openapi-typescript'), [source, '-o', out], { stdio: ['ignore', 'ignore', 'inherit'] })
  if (check && (!existsSync(target) || readFileSync(out, 'utf8') !== readFileSync(target, 'utf8'))) {
    console.error('src/lib/schema.d.ts is not what openapi/openapi.json gives: run `npm run schema` and commit it')
    process.exit(1)
  }
  console.log(check ? 'schema.d.ts matches openapi.json' : 'schema.d.ts written')
} finally {
  if (scratch) rmSync(scratch, { recursive: true, force: true })
}
