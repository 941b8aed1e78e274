import type { Config, SecretRef } from './types'

/** One variable while it is being edited. Rows keep their identity and order until they are saved. */
export interface EnvRow {
  id: number
  key: string
  value: string
}
export interface SecretRow {
  id: number
  name: string
  target: 'env' | 'file'
  where: string
}
export interface Draft {
  env: EnvRow[]
  secrets: SecretRow[]
}

let nextId = 1
export const rowId = () => nextId++

export function draftOf(config: Config): Draft {
  return {
    env: Object.entries(config.env)
      .sort(([a], [b]) => a.localeCompare(b))
      .map(([key, value]) => ({ id: rowId(), key, value })),
    secrets: config.secrets.map((ref) => ({ id: rowId(), name: ref.name, target: ref.file ? 'file' : 'env', where: ref.file ?? ref.env ?? ref.name })),
  }
}

/** The draft as the API takes it: everything the draft does not edit stays as it was. Empty rows are dropped. */
export function configOf(draft: Draft, base: Config): Config {
  const env: Record<string, string> = {}
  for (const row of draft.env) if (row.key.trim() !== '') env[row.key.trim()] = row.value
  const secrets: SecretRef[] = draft.secrets
    .filter((row) => row.name !== '')
    .map((row) => (row.target === 'file' ? { name: row.name, file: row.where.trim() } : { name: row.name, env: row.where.trim() || row.name }))
  return { ...base, env, secrets }
}

/** Problems by row id; empty when the draft can be sent. */
export function draftProblems(draft: Draft): Map<number, string> {
  const problems = new Map<number, string>()
  const seen = new Map<string, number>()
  const claim = (what: string, id: number, shown: string) => {
    if (seen.has(what)) problems.set(id, `${shown} is given twice`)
    else seen.set(what, id)
  }
  for (const row of draft.env) {
    const key = row.key.trim()
    if (key === '') {
      if (row.value !== '') problems.set(row.id, 'Needs a name')
      continue
    }
    if (!/^[A-Za-z_][A-Za-z0-9_]{0,127}$/.test(key)) problems.set(row.id, 'Letters, digits and underscores, not starting with a digit')
    else claim(`env ${key}`, row.id, key)
  }
  for (const row of draft.secrets) {
    if (row.name === '') continue
    const where = row.where.trim()
    if (row.target === 'file') {
      if (!where.startsWith('/') || where.length < 2) problems.set(row.id, 'An absolute path, such as /run/secrets/key')
      else claim(`file ${where}`, row.id, where)
    } else if (where !== '' && !/^[A-Za-z_][A-Za-z0-9_]{0,127}$/.test(where)) problems.set(row.id, 'Letters, digits and underscores, not starting with a digit')
    else claim(`env ${where || row.name}`, row.id, where || row.name)
  }
  return problems
}

/** How many variables and references differ from what is saved. */
export function countChanges(draft: Draft, base: Config): number {
  const next = configOf(draft, base)
  const flat = (config: Config) =>
    new Map<string, string>([
      ...Object.entries(config.env).map(([key, value]): [string, string] => [`env ${key}`, `= ${value}`]),
      ...config.secrets.map((ref): [string, string] => [ref.file ? `file ${ref.file}` : `env ${ref.env ?? ref.name}`, `secret ${ref.name}`]),
    ])
  const before = flat(base)
  const after = flat(next)
  let count = 0
  for (const key of new Set([...before.keys(), ...after.keys()])) if (before.get(key) !== after.get(key)) count++
  return count
}
