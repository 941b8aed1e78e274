// What every drive of the console needs: a browser, counted checks, axe in both themes, pictures, and an ear for console errors,
// policy reports and layout shifts.
import { mkdirSync, mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { createRequire } from 'node:module'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { chromium } from 'playwright-core'

const require = createRequire(import.meta.url)
const axeSource = readFileSync(require.resolve('axe-core/axe.min.js'), 'utf8')

export const BASE_URL = (process.env.BASE_URL ?? '').replace(/\/$/, '')
const SHOTS = process.env.SCREENSHOT_DIR

let passed = 0
let failed = 0

/** Runs one check; a failure is told and counted, and the drive goes on. Answers whether it passed. */
export async function check(name, run) {
  const started = performance.now()
  try {
    await run()
    passed++
    console.log(`ok    ${name} (${Math.round(performance.now() - started)} ms)`)
    return true
  } catch (error) {
    failed++
    console.log(`FAIL  ${name}\n      ${String(error?.message ?? error).split('\n').slice(0, 12).join('\n      ')}`)
    return false
  }
}

export function finish() {
  console.log(`${passed} passed, ${failed} failed`)
  process.exitCode = failed > 0 || passed === 0 ? 1 : 0
}

export function expect(condition, message) {
  if (!condition) throw new Error(message)
}

/** One browser with a profile of its own. `browser.context(options)` opens a person's window. */
export async function openBrowser() {
  const profile = mkdtempSync(join(tmpdir(), 'clawhq-e2e-'))
  const browser = await chromium.launch({
    executablePath: process.env.CHROMIUM ?? '/usr/bin/chromium',
    headless: true,
    args: ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync', `--crash-dumps-dir=${profile}`],
  })
  return {
    browser,
    async close() {
      await browser.close()
      rmSync(profile, { recursive: true, force: true })
    },
  }
}

/** Opens a window and listens to it. `faults` fills with whatever should not have happened. */
export async function openWindow(browser, options = {}) {
  const faults = []
  const context = await browser.newContext({ baseURL: BASE_URL, viewport: { width: 1280, height: 860 }, colorScheme: 'light', permissions: ['clipboard-read', 'clipboard-write'], ...options })
  await context.exposeBinding('__report', (_, what) => faults.push(what))
  await context.addInitScript(() => {
    document.addEventListener('securitypolicyviolation', (event) => window.__report(`policy: ${event.violatedDirective} blocked ${event.blockedURI} ${event.sample}`))
    window.__cls = 0
    new PerformanceObserver((list) => {
      for (const entry of list.getEntries()) {
        if (entry.hadRecentInput) continue
        window.__cls += entry.value
        window.__shifts = [...(window.__shifts ?? []), `${entry.value.toFixed(4)} ${entry.sources.map((s) => `${s.node?.nodeName}.${s.node?.className ?? ''}`.slice(0, 60)).join(' | ')}`]
      }
    }).observe({ type: 'layout-shift', buffered: true })
  })
  const listen = (page) => {
    page.on('pageerror', (error) => faults.push(`page error: ${error.message}`))
    page.on('console', (message) => {
      if (message.type() !== 'error') return
      // The browser itself logs refused requests; those a check provokes on purpose are named by it.
      if (page.__expected?.some((pattern) => pattern.test(message.text()))) return
      faults.push(`console: ${message.text()} (${message.location().url})`)
    })
  }
  context.on('page', listen)
  const page = await context.newPage()
  page.setDefaultTimeout(15_000)
  return { context, page, faults }
}

/** Lets the browser's own complaint about a provoked refusal pass. */
export async function expecting(page, pattern, run) {
  page.__expected = [...(page.__expected ?? []), pattern]
  try {
    return await run()
  } finally {
    page.__expected = page.__expected.filter((p) => p !== pattern)
  }
}

async function settle(page) {
  await page.evaluate(() => Promise.all(document.getAnimations().filter((a) => a.effect?.getComputedTiming().iterations !== Infinity).map((a) => a.finished.catch(() => undefined))))
  await page.evaluate(() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done))))
}

async function axe(page) {
  if (!(await page.evaluate(() => 'axe' in window))) await page.evaluate(axeSource)
  const found = await page.evaluate(async () => {
    const result = await window.axe.run(document, { runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa', 'best-practice'], resultTypes: ['violations'] })
    return result.violations.flatMap((v) => v.nodes.map((n) => `${v.id}: ${n.target.join(' ')} ${n.any[0]?.message ?? n.none[0]?.message ?? n.all[0]?.message ?? ''}`))
  })
  return found
}

/** A screen's gate: pictures and axe in both themes, no sideways scrolling, and a layout that held still. */
export async function screen(page, name, { cls = true } = {}) {
  await check(`screen ${name}: axe in both themes, no overflow${cls ? ', no layout shift' : ''}`, async () => {
    const problems = []
    for (const scheme of ['light', 'dark']) {
      await page.emulateMedia({ colorScheme: scheme })
      await settle(page)
      if (SHOTS) {
        mkdirSync(SHOTS, { recursive: true })
        await page.screenshot({ path: join(SHOTS, `${name}-${scheme}.png`) })
      }
      problems.push(...(await axe(page)).map((v) => `${scheme} ${v}`))
    }
    await page.emulateMedia({ colorScheme: 'light' })
    const wide = await page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth)
    if (wide > 0) problems.push(`the page is ${wide} px wider than the window`)
    if (cls) {
      const [shift, shifts] = await page.evaluate(() => [window.__cls, window.__shifts ?? []])
      if (shift > 0.02) problems.push(`layout shifted by ${shift.toFixed(3)}: ${shifts.join('; ')}`)
    }
    expect(problems.length === 0, problems.join('\n      '))
  })
  await page.evaluate(() => {
    window.__cls = 0
    window.__shifts = []
  })
}

/** Presses Tab until the focused element answers to the role and name; what cannot be reached that way fails. */
export async function tabTo(page, role, name, { max = 80, key = 'Tab' } = {}) {
  const target = page.getByRole(role, { name, exact: typeof name === 'string' }).first()
  await target.waitFor()
  for (let i = 0; i < max; i++) {
    if (await target.evaluate((element) => element === document.activeElement)) return target
    await page.keyboard.press(key)
  }
  throw new Error(`${max} presses of ${key} do not reach ${role} ${name}`)
}
