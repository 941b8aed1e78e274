import { ApiError, asApiError, problemFrom } from './problem'
import type {
  ApiKey,
  Deployed,
  CreatedApiKey,
  CreateWorkload,
  Change,
  EventItem,
  Me,
  Member,
  Org,
  Page,
  Release,
  Secret,
  SecretVersion,
  Session,
  Template,
  Tier,
  Workload,
  Config,
} from './types'

type Method = 'GET' | 'POST' | 'PUT' | 'PATCH' | 'DELETE'
interface CallOptions {
  query?: Record<string, string | number | boolean | undefined>
  body?: unknown
  headers?: Record<string, string>
  signal?: AbortSignal | undefined
  /** Milliseconds until the request is given up. */
  deadline?: number
}

const DEADLINE = 20_000

/** A fresh Idempotency-Key: repeating a request with the same key can never do the thing twice. */
export function idempotencyKey(): string {
  if (typeof crypto.randomUUID === 'function') return crypto.randomUUID()
  // Plain HTTP to an address other than localhost is no secure context and has no randomUUID.
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (b) => b.toString(16).padStart(2, '0')).join('')
}

async function call<T>(method: Method, path: string, options: CallOptions = {}): Promise<T> {
  const url = new URL(`/v1${path}`, location.origin)
  for (const [key, value] of Object.entries(options.query ?? {})) if (value !== undefined) url.searchParams.set(key, String(value))
  const timeout = AbortSignal.timeout(options.deadline ?? DEADLINE)
  const headers: Record<string, string> = { accept: 'application/json', ...options.headers }
  if (options.body !== undefined) headers['content-type'] = 'application/json'
  if (method === 'POST' && !headers['idempotency-key']) headers['idempotency-key'] = idempotencyKey()
  let response: Response
  let body: unknown
  try {
    response = await fetch(url, {
      method,
      headers,
      credentials: 'same-origin',
      body: options.body === undefined ? null : JSON.stringify(options.body),
      signal: options.signal ? AbortSignal.any([options.signal, timeout]) : timeout,
    })
    const text = await response.text()
    body = text === '' ? undefined : JSON.parse(text)
  } catch (error) {
    if (options.signal?.aborted) throw error
    if (error instanceof SyntaxError)
      throw new ApiError({ status: 502, code: 'bad_answer', title: 'The answer was not JSON', detail: 'Something between you and ClawHQ answered in its place.' })
    throw asApiError(error)
  }
  if (!response.ok) throw problemFrom(response.status, body, response.headers)
  return body as T
}

const seg = encodeURIComponent
const workload = (org: string, wl: string) => `/orgs/${seg(org)}/workloads/${seg(wl)}`

/** Walks a cursor list to its end, at most `max` items. */
async function all<T>(path: string, query: CallOptions['query'] = {}, signal?: AbortSignal, max = 1000): Promise<T[]> {
  const items: T[] = []
  let cursor: string | undefined
  do {
    const page = await call<Page<T>>('GET', path, { query: { limit: 200, ...query, cursor }, signal })
    items.push(...page.items)
    cursor = page.next_cursor ?? undefined
  } while (cursor && items.length < max)
  return items
}

export interface Diff {
  diff: Change[]
}
export type Action = 'start' | 'stop' | 'restart'

export const api = {
  signUp: (body: { email: string; password: string; org_name?: string }) => call<Me>('POST', '/auth/sign-up', { body }),
  signIn: (body: { email: string; password: string }) => call<Me>('POST', '/auth/sign-in', { body }),
  signOut: () => call<void>('POST', '/auth/sign-out'),
  me: (signal?: AbortSignal) => call<Me>('GET', '/me', { signal }),
  sessions: (signal?: AbortSignal) => all<Session>('/me/sessions', {}, signal),
  revokeSession: (id: string) => call<void>('DELETE', `/me/sessions/${seg(id)}`),

  createOrg: (body: { name: string; slug?: string }) => call<Org>('POST', '/orgs', { body }),
  renameOrg: (org: string, body: { name: string }) => call<Org>('PATCH', `/orgs/${seg(org)}`, { body }),
  members: (org: string, signal?: AbortSignal) => all<Member>(`/orgs/${seg(org)}/members`, {}, signal),
  addMember: (org: string, body: { email: string; role: string }) => call<Member>('POST', `/orgs/${seg(org)}/members`, { body }),
  removeMember: (org: string, user: string) => call<void>('DELETE', `/orgs/${seg(org)}/members/${seg(user)}`),
  apiKeys: (org: string, signal?: AbortSignal) => all<ApiKey>(`/orgs/${seg(org)}/api-keys`, {}, signal),
  createApiKey: (org: string, body: { name: string; expires_at?: string }) =>
    call<CreatedApiKey>('POST', `/orgs/${seg(org)}/api-keys`, { body }),
  deleteApiKey: (org: string, id: string) => call<void>('DELETE', `/orgs/${seg(org)}/api-keys/${seg(id)}`),

  templates: (signal?: AbortSignal) => all<Template>('/templates', {}, signal),
  tiers: (signal?: AbortSignal) => all<Tier>('/tiers', {}, signal),

  workloads: (org: string, signal?: AbortSignal) => all<Workload>(`/orgs/${seg(org)}/workloads`, {}, signal),
  workload: (org: string, wl: string, signal?: AbortSignal) => call<Workload>('GET', workload(org, wl), { signal }),
  /** Answers once the workload runs, or after 30 s with the state it is in then. Repeat with the same `key` to learn the outcome. */
  deploy: (org: string, body: CreateWorkload, key: string) =>
    call<Deployed>('POST', `/orgs/${seg(org)}/workloads`, {
      body,
      headers: { 'idempotency-key': key, prefer: 'wait=30' },
      deadline: 45_000,
    }),
  act: (org: string, wl: string, action: Action) =>
    call<Workload>('POST', `${workload(org, wl)}/${action}`, { deadline: 45_000 }),
  deleteWorkload: (org: string, wl: string) => call<void>('DELETE', workload(org, wl), { deadline: 45_000 }),
  diffConfig: (org: string, wl: string, config: Config) =>
    call<Diff>('PATCH', workload(org, wl), { query: { dry_run: true }, body: { config } }),
  applyConfig: (org: string, wl: string, config: Config) =>
    call<Workload>('PATCH', workload(org, wl), { body: { config }, deadline: 45_000 }),
  releases: (org: string, wl: string, signal?: AbortSignal) => all<Release>(`${workload(org, wl)}/releases`, {}, signal, 200),
  workloadEvents: (org: string, wl: string, signal?: AbortSignal) => all<EventItem>(`${workload(org, wl)}/events`, {}, signal, 200),
  terminalTicket: (org: string, wl: string) => call<{ ticket: string }>('POST', `${workload(org, wl)}/terminal-tickets`),

  events: (org: string, cursor?: string, signal?: AbortSignal) =>
    call<Page<EventItem>>('GET', `/orgs/${seg(org)}/events`, { query: { limit: 50, cursor }, signal }),

  secrets: (org: string, signal?: AbortSignal) => all<Secret>(`/orgs/${seg(org)}/secrets`, {}, signal),
  setSecret: (org: string, name: string, value: string) =>
    call<{ name: string; version: number }>('PUT', `/orgs/${seg(org)}/secrets/${seg(name)}`, { body: { value } }),
  secretVersions: (org: string, name: string, signal?: AbortSignal) =>
    all<SecretVersion>(`/orgs/${seg(org)}/secrets/${seg(name)}/versions`, {}, signal, 200),
  deleteSecret: (org: string, name: string) => call<void>('DELETE', `/orgs/${seg(org)}/secrets/${seg(name)}`),
}

export const streams = {
  orgEvents: (org: string) => `/v1/orgs/${seg(org)}/events/stream`,
  logs: (org: string, wl: string) => `/v1${workload(org, wl)}/logs/stream`,
  terminal: (org: string, wl: string, query: Record<string, string>) => {
    const url = new URL(`/v1${workload(org, wl)}/terminal`, location.origin)
    url.protocol = url.protocol === 'https:' ? 'wss:' : 'ws:'
    for (const [key, value] of Object.entries(query)) url.searchParams.set(key, value)
    return url
  },
}
