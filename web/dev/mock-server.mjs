// DEVELOPMENT ONLY. An in-memory stand-in for the API, for working on the console's looks without a control plane. Nothing of the
// product uses it, and no test of the product runs against it: the e2e drive needs a real `clawhq up`.
//
//   node dev/mock-server.mjs [port] [--full]     --full: starts with one org full of workloads in every state
import { createHash, randomBytes } from 'node:crypto'
import { existsSync, readFileSync } from 'node:fs'
import { createServer } from 'node:http'
import { extname, join, normalize } from 'node:path'

const port = Number(process.argv[2] ?? 4180)
const full = process.argv.includes('--full')
const dist = new URL('../dist/', import.meta.url).pathname
const now = () => new Date().toISOString()
const past = (minutes) => new Date(Date.now() - minutes * 60_000).toISOString()
const id = (prefix) => `${prefix}_${randomBytes(16).toString('hex').slice(0, 26)}`

const users = new Map()
const sessions = new Map()
const orgs = new Map()
const tiers = [
  ['free', 256, 3],
  ['pro', 512, 20],
  ['business', 1024, 100],
  ['enterprise', 2048, 1000],
].map(([name, memory_mib, max_workloads]) => ({ name, memory_mib, memory_burst_mib: memory_mib, cpu_shares: memory_mib, cpu_millis: 1000, pids: 256, max_workloads, volume_mib: memory_mib * 4, rate_per_min: 60 }))
const templates = [
  { name: 'hello', title: 'Hello', description: 'A tiny real agent that answers over HTTP and WebSocket. The quickest way to see how it feels.', icon: 'spark', image: 'clawhq/hello:1', warm_mode: 'exec', least_memory_mib: 16, ports: [{ name: 'http', port: 8080, protocol: 'http' }], env: {}, volume: null, config_schema: null, unavailable: null },
  { name: 'openclaw', title: 'OpenClaw', description: 'The OpenClaw gateway, started and ready before you ask, with a token of its own.', icon: 'claw', image: 'clawhq/openclaw:1', warm_mode: 'frozen', least_memory_mib: 800, ports: [{ name: 'http', port: 18789, protocol: 'http' }], env: {}, volume: { path: '/home/node/.openclaw', size_mib: 512 }, config_schema: null, unavailable: null },
]

function makeOrg(name, slug, tier = 'free') {
  const org = { id: id('org'), slug, name, tier, created_at: now(), workloads: new Map(), events: [], seq: 0, secrets: new Map(), keys: new Map(), members: new Map(), streams: new Set() }
  orgs.set(slug, org)
  return org
}
function makeUser(email, password) {
  const user = { id: id('usr'), email, password }
  users.set(email, user)
  return user
}
function emit(org, workload, kind, message, at = now()) {
  const event = { id: id('evt'), seq: ++org.seq, kind, message, at, workload_id: workload?.id ?? null, instance_id: workload?.instance?.id ?? null, data: {} }
  org.events.unshift(event)
  for (const res of org.streams) res.write(`event: event\nid: ${event.seq}\ndata: ${JSON.stringify(event)}\n\n`)
}
function makeWorkload(org, user, body, state = 'running') {
  const template = templates.find((t) => t.name === body.template)
  const image = { ref: template?.image ?? body.image, digest: `sha256:${createHash('sha256').update(template?.image ?? body.image).digest('hex')}` }
  const warm = template && template.warm_mode !== 'none'
  const config = { env: {}, secrets: [], files: [], argv: null, ports: null, volume: null, uid: null, ...body.config }
  const w = {
    id: id('wl'), name: body.name ?? `workload-${org.workloads.size + 1}`, org_id: org.id, template: template?.name ?? null, image, tier: body.tier ?? org.tier, state, reason: null, desired: 'running',
    url: template || config.ports ? `http://${body.name}-${org.slug}.localhost:${port}` : null, warm: 'prefer',
    release: { id: id('rel'), number: 1, image, config, created_at: now(), created_by: user.id, diff: [] }, releases: [], instance: null, queue: null, resource_version: randomBytes(4).toString('hex'), generation: 1, created_at: now(), updated_at: now(), logs: [], sinks: new Set(),
  }
  w.releases.push(w.release)
  org.workloads.set(w.name, w)
  return { w, warm }
}
function place(w, warm) {
  const steps = warm
    ? [['accepted', 0.4], ['committed', 1.7], ['claimed', 0.9], ['started', 2.2], ['ready', 1.6]]
    : [['accepted', 0.5], ['committed', 1.9], ['image', 12.4], ['created', 241], ['started', 38.6], ['ready', 22.8]]
  w.instance = { id: id('ins'), workload_id: w.id, release_id: w.release.id, placement: warm ? 'warm' : 'cold', state: 'running', reason: null, queued_at: now(), started_at: now(), ready_at: now(), ended_at: null, restarts: 0, exit_code: null, steps: steps.map(([name, ms]) => ({ name, ms })), total_ms: steps.reduce((a, [, ms]) => a + ms, 0) }
  w.state = 'running'
  w.reason = null
  w.updated_at = now()
}
function log(w, line, stream = 'stdout', ts = now()) {
  const entry = { ts, stream, line, id: Date.parse(ts) }
  w.logs.push(entry)
  for (const sink of w.sinks) sink(entry)
}
const view = ({ logs, sinks, releases, ...w }) => w

function boot(w) {
  log(w, '\x1b[2mhello 1.0.0\x1b[0m starting')
  log(w, `\x1b[32mINFO\x1b[0m listening on \x1b[1m0.0.0.0:8080\x1b[0m`)
  log(w, '\x1b[32mINFO\x1b[0m ready')
}
setInterval(() => {
  for (const org of orgs.values()) for (const w of org.workloads.values()) if (w.state === 'running') log(w, Math.random() < 0.12 ? '\x1b[33mWARN\x1b[0m slow client, 1.2 s behind' : `\x1b[32mINFO\x1b[0m GET /healthz \x1b[36m200\x1b[0m ${(Math.random() * 2).toFixed(2)} ms`, Math.random() < 0.06 ? 'stderr' : 'stdout')
}, 900).unref()

if (full) {
  const user = makeUser('ada@example.org', 'correct horse')
  const org = makeOrg("Ada's agents", 'ada', 'business')
  org.members.set(user.id, { user_id: user.id, email: user.email, role: 'owner', created_at: past(9000) })
  const grace = makeUser('grace@example.org', 'correct horse')
  org.members.set(grace.id, { user_id: grace.id, email: grace.email, role: 'member', created_at: past(3000) })
  for (const [name, template, state] of [['swift-otter', 'hello', 'running'], ['research-claw', 'openclaw', 'running'], ['nightly-digest', 'hello', 'stopped'], ['mail-sorter', null, 'failed'], ['price-watch', null, 'queued'], ['support-claw', 'openclaw', 'running'], ['scraper', null, 'restarting']]) {
    const { w, warm } = makeWorkload(org, user, { name, ...(template ? { template } : { image: 'ghcr.io/acme/agent:2.4' }), tier: template === 'openclaw' ? 'business' : 'free', config: { env: { LOG_LEVEL: 'info', REGION: 'eu' }, secrets: [{ name: 'OPENAI_API_KEY', env: 'OPENAI_API_KEY', version: 2 }] } })
    emit(org, w, 'workload.created', `${name} was created by ${user.email}.`, past(400))
    if (state === 'running') {
      place(w, warm)
      w.updated_at = w.instance.ready_at = past(37)
      emit(org, w, 'instance.running', `${name} answers.`, past(37))
      boot(w)
      w.release = { ...w.release, id: id('rel'), number: 2, created_at: past(37), diff: [{ field: 'env.LOG_LEVEL', before: 'warn', after: 'info' }, { field: 'secrets.OPENAI_API_KEY.env OPENAI_API_KEY', before: 'version 1', after: 'version 2' }] }
      w.releases.push(w.release)
    }
    if (state === 'stopped') Object.assign(w, { state, desired: 'stopped' })
    if (state === 'queued') Object.assign(w, { state, queue: { position: 2, estimate_ms: 45_000 } })
    if (state === 'failed') {
      place(w, false)
      w.instance.ended_at = past(12)
      Object.assign(w, { state, reason: { code: 'out_of_memory', message: 'The process used more than 256 MiB and was ended by the kernel.', hint: 'Use less memory or choose a larger tier.', log_tail: ['INFO  loaded 48210 messages', 'INFO  building index', 'WARN  heap at 231 MiB', 'INFO  building index 62 %', 'Killed'] } })
      emit(org, w, 'instance.failed', 'mail-sorter ran out of memory.', past(12))
    }
    if (state === 'restarting') {
      place(w, false)
      w.instance.restarts = 4
      Object.assign(w, { state, reason: { code: 'crash_loop', message: 'It ended 4 times in a row with exit code 1; the next try is in 20 s.', hint: 'Read the last log lines: the process ends by itself.', log_tail: ['Error: connect ECONNREFUSED 10.0.0.5:5432', '    at TCPConnectWrap.afterConnect [as oncomplete]', 'exit code 1'] } })
    }
  }
  for (const [name, v] of [['OPENAI_API_KEY', 2], ['DATABASE_URL', 1], ['SLACK_TOKEN', 5]]) org.secrets.set(name, { id: id('sec'), name, version: v, created_at: past(4000), updated_at: past(v * 90), by: user.id })
  org.keys.set('k1', { id: id('key'), name: 'deploy from CI', prefix: 'chq_4f9a2c', created_at: past(20_000), expires_at: new Date(Date.now() + 60 * 86_400_000).toISOString(), last_used_at: past(3) })
  org.keys.set('k2', { id: id('key'), name: 'old laptop', prefix: 'chq_77ab01', created_at: past(90_000), expires_at: past(1000), last_used_at: null })
}

const problem = (res, status, code, title, detail, errors = []) => send(res, status, { type: 'about:blank', title, status, detail, code, request_id: id('req'), errors }, 'application/problem+json')
function send(res, status, body, type = 'application/json', headers = {}) {
  res.writeHead(status, { 'content-type': type, 'cache-control': 'no-store', ...headers })
  res.end(body === undefined ? undefined : JSON.stringify(body))
}
async function readBody(req) {
  let text = ''
  for await (const chunk of req) text += chunk
  return text === '' ? {} : JSON.parse(text)
}
const sessionOf = (req) => keyOwner(req) ?? sessions.get(/clawhq_session=([^;]+)/.exec(req.headers.cookie ?? '')?.[1])
const meOf = (user) => ({ user: { id: user.id, email: user.email }, orgs: [...orgs.values()].filter((o) => o.members.has(user.id)).map((o) => ({ id: o.id, slug: o.slug, name: o.name, role: o.members.get(user.id).role, tier: o.tier })) })
function keyOwner(req) {
  const key = /^Bearer (.+)$/.exec(req.headers.authorization ?? '')?.[1]
  for (const org of key ? orgs.values() : []) for (const k of org.keys.values()) if (k.secret === key) return { user: [...users.values()].find((u) => org.members.has(u.id)) }
  return undefined
}
const page = (items) => ({ items, next_cursor: null })

async function api(req, res, url) {
  const path = url.pathname.slice(3)
  const method = req.method
  const body = method === 'GET' || method === 'DELETE' ? {} : await readBody(req)
  const signIn = (user, status) => {
    const key = randomBytes(12).toString('hex')
    sessions.set(key, { id: id('ses'), user, created_at: now(), user_agent: req.headers['user-agent'], ip: '127.0.0.1' })
    send(res, status, meOf(user), undefined, { 'set-cookie': `clawhq_session=${key}; HttpOnly; SameSite=Lax; Path=/` })
  }
  if (path === '/auth/sign-up') {
    if (users.has(body.email)) return problem(res, 409, 'email_taken', 'That address has an account', 'Sign in instead, or use another address.', [{ pointer: '/email', detail: 'There is an account of this address already.' }])
    const user = makeUser(body.email, body.password)
    const slug = body.email.split('@')[0].toLowerCase().replace(/[^a-z0-9]/g, '').slice(0, 20) || 'org'
    makeOrg(body.org_name ?? `${slug}'s org`, slug).members.set(user.id, { user_id: user.id, email: user.email, role: 'owner', created_at: now() })
    return signIn(user, 201)
  }
  if (path === '/auth/sign-in') {
    const user = users.get(body.email)
    if (!user || user.password !== body.password) return problem(res, 401, 'bad_credentials', 'Not signed in', 'The e-mail address or the password is wrong.')
    return signIn(user, 200)
  }
  const session = sessionOf(req)
  if (!session) return problem(res, 401, 'not_signed_in', 'Not signed in', 'Sign in, or send an API key.')
  const user = session.user
  if (path === '/auth/sign-out') {
    for (const [key, s] of sessions) if (s === session) sessions.delete(key)
    return send(res, 204)
  }
  if (path === '/me') return send(res, 200, meOf(user))
  if (path === '/me/sessions') return send(res, 200, page([...sessions.values()].filter((s) => s.user === user).map((s) => ({ id: s.id, created_at: s.created_at, last_seen_at: now(), expires_at: now(), user_agent: s.user_agent, ip: s.ip, current: s === session }))))
  if (path.startsWith('/me/sessions/')) {
    for (const [key, s] of sessions) if (s.id === path.slice(13)) sessions.delete(key)
    return send(res, 204)
  }
  if (path === '/templates') return send(res, 200, page(templates))
  if (path === '/tiers') return send(res, 200, page(tiers))
  if (path === '/orgs' && method === 'POST') {
    const slug = body.name.toLowerCase().replace(/[^a-z0-9]/g, '').slice(0, 20)
    const org = makeOrg(body.name, slug)
    org.members.set(user.id, { user_id: user.id, email: user.email, role: 'owner', created_at: now() })
    return send(res, 201, { id: org.id, slug, name: org.name, role: 'owner', tier: org.tier, created_at: org.created_at })
  }
  const [, , slug, kind, key, verb, extra] = path.split('/').map(decodeURIComponent)
  const org = orgs.get(slug)
  if (!org || !org.members.has(user.id)) return problem(res, 404, 'not_found', 'Not found', 'There is no such org.')
  if (kind === 'members') {
    if (method === 'GET') return send(res, 200, page([...org.members.values()]))
    if (method === 'POST') {
      const other = users.get(body.email)
      if (!other) return problem(res, 404, 'no_such_user', 'No such account', 'Nobody of that address has an account yet.', [{ pointer: '/email', detail: 'Nobody of that address has an account yet.' }])
      org.members.set(other.id, { user_id: other.id, email: other.email, role: body.role, created_at: now() })
      return send(res, 201, org.members.get(other.id))
    }
    org.members.delete(key)
    return send(res, 204)
  }
  if (kind === 'api-keys') {
    if (method === 'GET') return send(res, 200, page([...org.keys.values()]))
    if (method === 'POST') {
      const secret = `chq_${randomBytes(24).toString('base64url')}`
      const made = { id: id('key'), name: body.name, prefix: secret.slice(0, 10), created_at: now(), expires_at: body.expires_at ?? null, last_used_at: null, secret }
      org.keys.set(made.id, made)
      return send(res, 201, { ...made, key: secret })
    }
    for (const [k, v] of org.keys) if (v.id === key) org.keys.delete(k)
    return send(res, 204)
  }
  if (kind === 'secrets') {
    if (!key) return send(res, 200, page([...org.secrets.values()].map(({ by, ...s }) => s)))
    if (method === 'PUT') {
      const before = org.secrets.get(key)
      const next = { id: before?.id ?? id('sec'), name: key, version: (before?.version ?? 0) + 1, created_at: before?.created_at ?? now(), updated_at: now(), by: user.id }
      org.secrets.set(key, next)
      emit(org, null, 'secret.set', `${key} was set by ${user.email}.`)
      return send(res, 200, next)
    }
    if (verb === 'versions') return send(res, 200, page(Array.from({ length: org.secrets.get(key)?.version ?? 0 }, (_, i) => ({ version: i + 1, created_at: past(i), created_by: user.id }))))
    org.secrets.delete(key)
    return send(res, 204)
  }
  if (kind === 'events') {
    if (key === 'stream') return sse(req, res, org)
    return send(res, 200, page(org.events.slice(0, 50)))
  }
  if (kind !== 'workloads') return problem(res, 404, 'not_found', 'Not found', 'There is no such thing.')
  if (!key) {
    if (method === 'GET') return send(res, 200, page([...org.workloads.values()].map(view)))
    if (org.workloads.has(body.name)) return problem(res, 409, 'name_taken', 'That name is in use', 'Choose another name.', [{ pointer: '/name', detail: 'There is a workload of this name.' }])
    const limit = tiers.find((t) => t.name === org.tier).max_workloads
    if (org.workloads.size >= limit) return problem(res, 403, 'too_many_workloads', 'No more workloads', `The ${org.tier} plan allows ${limit}.`)
    const { w, warm } = makeWorkload(org, user, body, 'starting')
    emit(org, w, 'workload.created', `${w.name} was created by ${user.email}.`)
    await new Promise((r) => setTimeout(r, warm ? 7 : 2600))
    if (body.image?.startsWith('localhost:1/')) {
      place(w, false)
      w.instance.ended_at = now()
      Object.assign(w, { state: 'failed', reason: { code: 'image_missing', message: `The image ${body.image} does not exist or may not be fetched.`, hint: 'Check the image’s name and tag, and that it may be pulled without credentials.', log_tail: [] } })
    } else {
      place(w, warm)
      boot(w)
      emit(org, w, 'instance.running', `${w.name} answers.`)
    }
    return send(res, 201, { workload: view(w), access: { url: w.url, token: body.template === 'openclaw' ? randomBytes(24).toString('base64url') : null }, placement: { kind: w.instance.placement, steps: w.instance.steps, total_ms: w.instance.total_ms, queue: null } })
  }
  const w = org.workloads.get(key) ?? [...org.workloads.values()].find((x) => x.id === key)
  if (!w) return problem(res, 404, 'not_found', 'Not found', 'There is no such workload.')
  if (!verb) {
    if (method === 'GET') return send(res, 200, view(w))
    if (method === 'DELETE') {
      org.workloads.delete(w.name)
      emit(org, w, 'workload.deleted', `${w.name} was deleted by ${user.email}.`)
      return send(res, 204)
    }
    const diff = []
    const before = w.release.config
    const after = body.config
    for (const k of new Set([...Object.keys(before.env), ...Object.keys(after.env)])) if (before.env[k] !== after.env[k]) diff.push({ field: `env.${k}`, before: before.env[k] ?? null, after: after.env[k] ?? null })
    const refs = (c) => new Map(c.secrets.map((s) => [`secrets.${s.name}.${s.file ? `file ${s.file}` : `env ${s.env ?? s.name}`}`, `version ${org.secrets.get(s.name)?.version ?? '?'}`]))
    for (const k of new Set([...refs(before).keys(), ...refs(after).keys()])) if (refs(before).get(k) !== refs(after).get(k)) diff.push({ field: k, before: refs(before).get(k) ?? null, after: refs(after).get(k) ?? null })
    if (url.searchParams.get('dry_run') === 'true') return send(res, 200, { diff })
    w.release = { ...w.release, id: id('rel'), number: w.release.number + 1, config: after, created_at: now(), diff }
    w.releases.push(w.release)
    w.updated_at = now()
    emit(org, w, 'release.created', `Release ${w.release.number} of ${w.name} by ${user.email}.`)
    return send(res, 200, view(w))
  }
  if (['start', 'stop', 'restart'].includes(verb)) {
    if (verb === 'stop') {
      Object.assign(w, { state: 'stopping', desired: 'stopped', updated_at: now() })
      setTimeout(() => {
        Object.assign(w, { state: 'stopped', instance: null, updated_at: now() })
        emit(org, w, 'instance.stopped', `${w.name} stopped.`)
      }, 600)
    } else {
      w.desired = 'running'
      w.state = verb === 'start' ? 'starting' : 'restarting'
      setTimeout(() => {
        place(w, w.template !== null)
        boot(w)
        emit(org, w, 'instance.running', `${w.name} answers.`)
      }, 700)
    }
    emit(org, w, `workload.${verb}`, `${verb} of ${w.name} asked for by ${user.email}.`)
    return send(res, 200, view(w))
  }
  if (verb === 'releases') return send(res, 200, page([...w.releases].reverse()))
  if (verb === 'events') return send(res, 200, page(org.events.filter((e) => e.workload_id === w.id)))
  if (verb === 'terminal-tickets') return send(res, 200, { ticket: randomBytes(8).toString('hex'), expires_at: now() })
  if (verb === 'logs' && extra === 'stream') return logStream(req, res, w, url)
  return problem(res, 404, 'not_found', 'Not found', 'There is no such operation.')
}

function sse(req, res, org) {
  res.writeHead(200, { 'content-type': 'text/event-stream', 'cache-control': 'no-store' })
  res.write('retry: 2000\n\n')
  org.streams.add(res)
  req.on('close', () => org.streams.delete(res))
}
function logStream(req, res, w, url) {
  res.writeHead(200, { 'content-type': 'text/event-stream', 'cache-control': 'no-store' })
  const put = (entry) => res.write(`event: log\nid: ${entry.id}\ndata: ${JSON.stringify({ ts: entry.ts, stream: entry.stream, line: entry.line })}\n\n`)
  const after = Number(url.searchParams.get('after') ?? 0)
  for (const entry of after ? w.logs.filter((e) => e.id >= after) : w.logs.slice(-Number(url.searchParams.get('tail') ?? 100))) put(entry)
  if (w.state !== 'running') {
    res.write('event: end\ndata: {"reason":"not_running","message":null}\n\n')
    return res.end()
  }
  w.sinks.add(put)
  req.on('close', () => w.sinks.delete(put))
}

const types = { '.js': 'text/javascript', '.css': 'text/css', '.svg': 'image/svg+xml', '.txt': 'text/plain; charset=utf-8', '.woff2': 'font/woff2', '.html': 'text/html; charset=utf-8' }
function asset(res, url) {
  const clean = normalize(url.pathname).replace(/^(\.\.[/\\])+/, '')
  const file = join(dist, clean)
  if (clean !== '/' && existsSync(file) && extname(file)) {
    res.writeHead(200, { 'content-type': types[extname(file)] ?? 'application/octet-stream' })
    return res.end(readFileSync(file))
  }
  if (clean.startsWith('/assets/')) {
    res.writeHead(404)
    return res.end()
  }
  const nonce = randomBytes(16).toString('base64')
  res.writeHead(200, {
    'content-type': types['.html'],
    'cache-control': 'no-store',
    'content-security-policy': `default-src 'self'; script-src 'self'; style-src 'self' 'nonce-${nonce}'; img-src 'self' data:; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; object-src 'none'; form-action 'self'; require-trusted-types-for 'script'`,
  })
  res.end(readFileSync(join(dist, 'index.html'), 'utf8').replaceAll('__CSP_NONCE__', nonce))
}

const server = createServer((req, res) => {
  const url = new URL(req.url, `http://${req.headers.host}`)
  if (/^[^.]+\.localhost/.test(req.headers.host)) {
    res.writeHead(200, { 'content-type': 'text/html' })
    return res.end('<!doctype html><link rel=icon href=data:,><p>hello')
  }
  if (url.pathname.startsWith('/v1/')) api(req, res, url).catch((error) => problem(res, 500, 'internal', 'The mock broke', String(error)))
  else asset(res, url)
})

// The terminal: a shell of three commands over a hand-made WebSocket.
server.on('upgrade', (req, socket) => {
  const accept = createHash('sha1').update(`${req.headers['sec-websocket-key']}258EAFA5-E914-47DA-95CA-C5AB0DC85B11`).digest('base64')
  socket.write(`HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: ${accept}\r\nSec-WebSocket-Protocol: term.v1\r\n\r\n`)
  const frame = (opcode, payload) => {
    const head = payload.length < 126 ? Buffer.from([0x80 | opcode, payload.length]) : Buffer.from([0x80 | opcode, 126, payload.length >> 8, payload.length & 255])
    socket.write(Buffer.concat([head, payload]))
  }
  const out = (text) => frame(2, Buffer.from(text))
  const prompt = '\x1b[38;5;209mhello\x1b[0m:\x1b[34m/\x1b[0m$ '
  out(prompt)
  let line = ''
  let buffer = Buffer.alloc(0)
  socket.on('data', (data) => {
    buffer = Buffer.concat([buffer, data])
    while (buffer.length >= 6) {
      const length = buffer[1] & 127
      if (length > 125 || buffer.length < 6 + length) return
      const opcode = buffer[0] & 15
      const mask = buffer.subarray(2, 6)
      const payload = Buffer.from(buffer.subarray(6, 6 + length).map((b, i) => b ^ mask[i % 4]))
      buffer = buffer.subarray(6 + length)
      if (opcode === 8) return socket.end()
      if (opcode !== 2) continue
      for (const c of payload.toString()) {
        if (c === '\r') {
          out('\r\n')
          if (line === 'exit') {
            frame(1, Buffer.from(JSON.stringify({ type: 'exit', code: 0 })))
            return socket.end()
          }
          if (line !== '') out(line.startsWith('/hello') ? 'hello 1.0.0: an agent that answers\r\n' : `${line}: not found\r\n`)
          line = ''
          out(prompt)
        } else if (c === '\x7f') {
          if (line !== '') {
            line = line.slice(0, -1)
            out('\b \b')
          }
        } else {
          line += c
          out(c)
        }
      }
    }
  })
  socket.on('error', () => socket.destroy())
})
server.listen(port, '127.0.0.1', () => console.log(`mock API and console on http://127.0.0.1:${port}${full ? ' (ada@example.org / correct horse)' : ''}`))
