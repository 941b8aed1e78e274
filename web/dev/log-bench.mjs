// DEVELOPMENT ONLY. How the log view fares under a flood, in Chromium, without a server: the event stream is replaced by a generator.
//   BASE_URL=http://127.0.0.1:4391 (mock server, --full) node dev/log-bench.mjs [lines per second]
import { openBrowser, openWindow } from '../e2e/harness.mjs'

const rate = Number(process.argv[2] ?? 5000)
const { browser, close } = await openBrowser()
const { page, context } = await openWindow(browser)
await context.addInitScript((perSecond) => {
  const Real = window.EventSource
  window.EventSource = class extends EventTarget {
    constructor(url) {
      if (!String(url).includes('/logs/')) return new Real(url)
      super()
      let n = 0
      const started = performance.now()
      const tick = () => {
        const due = Math.floor(((performance.now() - started) / 1000) * perSecond)
        for (; n < due; n++) {
          const data = JSON.stringify({ ts: new Date().toISOString(), stream: n % 40 ? 'stdout' : 'stderr', line: `\u001b[32mINFO\u001b[0m request ${n} took \u001b[36m${n % 97} ms\u001b[0m` })
          this.dispatchEvent(new MessageEvent('log', { data, lastEventId: String(n) }))
        }
      }
      this.timer = setInterval(tick, 10)
      setTimeout(() => this.dispatchEvent(new Event('open')), 0)
    }
    close() {
      clearInterval(this.timer)
    }
  }
}, rate)
await page.goto('/sign-in')
await page.getByLabel('E-mail').fill('ada@example.org')
await page.getByLabel('Password').fill('correct horse')
await page.getByRole('button', { name: 'Sign in' }).click()
await page.waitForURL('**/orgs/ada')
await page.goto('/orgs/ada/workloads/swift-otter/logs')
await page.locator('[data-index]').first().waitFor()
const result = await page.evaluate(async () => {
  let worst = 0
  new PerformanceObserver((list) => {
    for (const entry of list.getEntries()) worst = Math.max(worst, entry.duration)
  }).observe({ type: 'longtask' })
  let frames = 0
  const seconds = 8
  const end = performance.now() + seconds * 1000
  await new Promise((done) => {
    const frame = () => {
      frames++
      if (performance.now() < end) requestAnimationFrame(frame)
      else done()
    }
    requestAnimationFrame(frame)
  })
  return { fps: frames / seconds, heapMb: performance.memory.usedJSHeapSize / 1e6, longestTaskMs: worst, nodes: document.querySelectorAll('*').length }
})
const before = Date.now()
await page.getByLabel('Search the log').fill('took 42')
await page.locator('mark').first().waitFor()
console.log({ rate, ...result, filterMs: Date.now() - before, following: await page.getByTestId('log-lines').getAttribute('data-follow') })
await close()
