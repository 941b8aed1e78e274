import { describe, expect, it } from 'vitest'
import { configOf, countChanges, draftOf, draftProblems } from './config'
import { deployCurl } from './curl'
import { ago, duration, mib, roughly, shellQuote } from './format'
import { credentials, fieldErrors, imageRef, secretForm } from './forms'
import { nameProblem, suggestName } from './names'
import { asApiError, problemFrom } from './problem'
import { homeOrg, safeNext } from './session'
import { byAttention, canRestart, canStart, canStop, needsAttention, stateGroup, stateLook } from './states'
import { startSteps, stepLabel, waterfall } from './steps'
import { AckCounter, ACK_STEP, readExit } from './term'
import type { Config, Me, Workload } from './types'
import { device } from './user-agent'

describe('format', () => {
  it.each([
    [0.42, '0.4 ms'],
    [7.26, '7.3 ms'],
    [412.4, '412 ms'],
    [6240, '6.2 s'],
    [200_000, '3 min 20 s'],
    [3_600_000, '1 h'],
    [Number.NaN, '–'],
    [-1, '–'],
  ])('duration(%s) = %s', (ms, text) => expect(duration(ms)).toBe(text))
  it('guesses without false precision', () => expect([roughly(45_000), roughly(20), roughly(190_000)]).toEqual(['45 s', '1 s', '3 min']))
  it('says how long ago', () => {
    const now = Date.parse('2026-05-05T12:00:00Z')
    expect(ago(now - 3000, now)).toBe('just now')
    expect(ago(now - 5 * 60_000, now)).toBe('5 min. ago')
    expect(ago(now - 26 * 3_600_000, now)).toBe('yesterday')
  })
  it('says memory as people do', () => expect([mib(256), mib(800), mib(1024), mib(2560)]).toEqual(['256 MiB', '800 MiB', '1 GiB', '2.5 GiB']))
  it('quotes for a shell only what needs it', () => expect([shellQuote('a-b_c'), shellQuote('a b'), shellQuote("it's")]).toEqual(['a-b_c', "'a b'", `'it'\\''s'`]))
})

describe('problems', () => {
  it('reads an RFC 9457 document', () => {
    const p = problemFrom(422, { title: 'No', detail: 'why', hint: 'do this', code: 'config_invalid', request_id: 'req_1', retry_after_ms: 50, errors: [{ pointer: '/config/env/A', detail: 'bad' }, { nonsense: 1 }] }, new Headers())
    expect(p).toMatchObject({ status: 422, code: 'config_invalid', title: 'No', message: 'why', hint: 'do this', requestId: 'req_1', retryAfterMs: 50 })
    expect(p.errors).toHaveLength(1)
    expect(p.field('/config/env')).toBe('bad')
    expect(p.field('/config/envelope')).toBeUndefined()
  })
  it('makes sense of answers that are none', () => {
    const p = problemFrom(502, '<html>', new Headers({ 'x-request-id': 'abc', 'retry-after': '3' }))
    expect(p).toMatchObject({ code: 'http_502', requestId: 'abc', retryAfterMs: 3000 })
  })
  it('names a broken network and a deadline', () => {
    expect(asApiError(new TypeError('Failed to fetch')).code).toBe('network')
    expect(asApiError(new DOMException('x', 'TimeoutError')).code).toBe('timeout')
  })
})

describe('states', () => {
  const w = (name: string, state: string) => ({ name, state }) as Workload
  it('puts what is broken first, then by name', () => {
    expect([w('c', 'running'), w('b', 'queued'), w('z', 'failed'), w('a', 'running'), w('d', 'unreachable')].sort(byAttention).map((x) => x.name)).toEqual(['z', 'd', 'b', 'a', 'c'])
  })
  it('shows a state it has never heard of by its own name', () => expect(stateLook('hibernating')).toMatchObject({ label: 'Hibernating', busy: false }))
  it('groups', () => expect(['running', 'stopping', 'failed', 'starting'].map(stateGroup)).toEqual(['running', 'stopped', 'attention', 'other']))
  it('offers only what can be done', () => {
    expect(canStop({ state: 'failed', desired: 'running' })).toBe(true)
    expect(canRestart({ state: 'queued', desired: 'running' })).toBe(false)
    expect(canStart({ state: 'stopped', desired: 'stopped' })).toBe(true)
    expect(canStart({ state: 'deleting', desired: 'deleted' })).toBe(false)
    expect(needsAttention({ state: 'stopped' })).toBe(false)
  })
})

describe('steps', () => {
  it('lays steps one after another', () => {
    const { bars, total } = waterfall([{ name: 'claim', ms: 1 }, { name: 'ready', ms: 3 }])
    expect(total).toBe(4)
    expect(bars).toMatchObject([{ label: 'Claimed', left: 0, width: 25 }, { label: 'Answering', left: 25, width: 75 }])
  })
  it('shows the control plane\'s part of a first start', () => {
    const instance = { steps: [{ name: 'claim', ms: 1 }, { name: 'ready', ms: 3 }], total_ms: 10, restarts: 0, placement: 'warm' }
    expect(startSteps(instance)).toEqual([{ name: 'commit', ms: 6 }, ...instance.steps])
    expect(startSteps({ ...instance, placement: 'queued' })[0]).toEqual({ name: 'queue', ms: 6 })
    for (const other of [{ restarts: 1 }, { total_ms: null }, { total_ms: 3 }]) expect(startSteps({ ...instance, ...other })).toEqual(instance.steps)
  })
  it('survives nothing and negative times', () => {
    expect(waterfall([])).toEqual({ bars: [], total: 0 })
    expect(waterfall([{ name: 'a', ms: -5 }]).bars[0]).toMatchObject({ left: 0, width: 0, ms: 0 })
  })
  it('makes a label of any name', () => expect([stepLabel('image_ready'), stepLabel('warm_up-cache'), stepLabel('')]).toEqual(['Image ready', 'Warm up cache', 'Step']))
})

describe('names', () => {
  it('suggests what is free', () => {
    expect(suggestName(new Set(), () => 0)).toBe('amber-badger')
    expect(suggestName(new Set(['amber-badger']), () => 0)).toBe('workload-2')
    for (let i = 0; i < 200; i++) expect(nameProblem(suggestName(new Set()))).toBeUndefined()
  })
  it.each(['', '-a', 'a-', 'a--b', 'A', '1a', 'a_b', 'x'.repeat(41)])('refuses %j', (name) => expect(nameProblem(name)).toBeTruthy())
})

describe('session', () => {
  const me: Me = { user: null, orgs: [{ id: '1', slug: 'a', name: 'A', role: 'owner', tier: 'free' }, { id: '2', slug: 'b', name: 'B', role: 'member', tier: 'free' }] }
  it('comes back to the last org, if it is still ours', () => {
    expect(homeOrg(me)?.slug).toBe('a')
    localStorage.setItem('clawhq.org', 'b')
    expect(homeOrg(me)?.slug).toBe('b')
    localStorage.setItem('clawhq.org', 'gone')
    expect(homeOrg(me)?.slug).toBe('a')
  })
  it.each(['https://evil.example', '//evil.example', '/\\evil.example', 'javascript:alert(1)', '/sign-in?next=/', ''])('does not follow %j', (next) => expect(safeNext(next)).toBeUndefined())
  it('follows a path of ours', () => expect(safeNext('/orgs/a?q=1')).toBe('/orgs/a?q=1'))
})

describe('forms', () => {
  it('checks credentials', () => {
    expect(fieldErrors(credentials, { email: ' a@b ', password: 'long enough' })).toEqual({})
    expect(Object.keys(fieldErrors(credentials, { email: 'nope', password: 'short' }))).toEqual(['email', 'password'])
  })
  it('checks secrets and images', () => {
    expect(fieldErrors(secretForm, { name: '1A', value: '' })).toMatchObject({ name: expect.any(String), value: 'Enter a value' })
    expect(fieldErrors(imageRef, 'ghcr.io/a/b:1')).toEqual({})
    expect(fieldErrors(imageRef, 'a b')).not.toEqual({})
  })
})

describe('config drafts', () => {
  const base: Config = { env: { B: '2', A: '1' }, secrets: [{ name: 'K', env: 'K', version: 3 }, { name: 'F', file: '/run/f' }], files: [], argv: ['/x'], volume: { path: '/d', size_mib: 5 } }
  it('goes there and back without a change', () => {
    const draft = draftOf(base)
    expect(draft.env.map((r) => r.key)).toEqual(['A', 'B'])
    expect(countChanges(draft, base)).toBe(0)
    expect(configOf(draft, base)).toEqual({ ...base, env: { A: '1', B: '2' }, secrets: [{ name: 'K', env: 'K' }, { name: 'F', file: '/run/f' }] })
  })
  it('counts what is changed, added and removed', () => {
    const draft = draftOf(base)
    draft.env[0]!.value = 'x'
    draft.env.push({ id: -1, key: 'NEW', value: '' }, { id: -2, key: '', value: '' })
    draft.secrets.pop()
    expect(countChanges(draft, base)).toBe(3)
  })
  it('finds what the server would refuse', () => {
    const draft = draftOf(base)
    draft.env.push({ id: -1, key: 'A', value: '' }, { id: -2, key: 'not ok', value: '' }, { id: -3, key: '', value: 'x' })
    draft.secrets.push({ id: -4, name: 'S', target: 'file', where: 'relative' }, { id: -5, name: 'S', target: 'env', where: 'B' })
    expect([...draftProblems(draft).keys()].sort((a, b) => b - a)).toEqual([-1, -2, -3, -4, -5])
  })
})

describe('terminal wire', () => {
  it('reads exits and nothing else', () => {
    expect(readExit('{"type":"exit","code":3,"reason":"exited","message":null}')).toEqual({ code: 3, reason: null })
    expect(readExit('{"type":"exit","code":null,"reason":"not_running","message":"It does not run."}')).toEqual({ code: null, reason: 'It does not run.' })
    expect(readExit('{"type":"exit","code":null,"reason":"shutdown"}')).toEqual({ code: null, reason: 'shutdown' })
    expect(readExit('{"type":"exit"}')).toEqual({ code: null, reason: null })
    for (const text of ['{"type":"ping"}', '[]', 'null', 'nonsense']) expect(readExit(text)).toBeUndefined()
  })
  it('acknowledges every byte once', () => {
    const acks = new AckCounter()
    let told = 0
    for (let i = 0; i < 100; i++) told += acks.shown(ACK_STEP / 3) ?? 0
    expect(told).toBeGreaterThan(ACK_STEP * 32)
    expect(told).toBeLessThanOrEqual((ACK_STEP / 3) * 100 + 1)
  })
})

it('writes the deploy as a command', () => {
  expect(deployCurl('http://h', 'ada', { template: 'hello', name: 'a' })).toContain(`--json '{"template":"hello","name":"a"}'`)
})

it('names browsers', () => {
  expect(device('Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/156.0 Safari/537.36')).toEqual({ name: 'Chrome on Linux', mobile: false })
  expect(device('curl/8.1')).toEqual({ name: 'curl', mobile: false })
  expect(device(null).name).toBe('Unknown browser')
})
