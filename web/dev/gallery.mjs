// DEVELOPMENT ONLY. Pictures of every screen with the mock server's full org: BASE_URL=… SCREENSHOT_DIR=… node dev/gallery.mjs [name…]
import { check, expect, finish, openBrowser, openWindow, screen } from '../e2e/harness.mjs'

const only = process.argv.slice(2)
const { browser, close } = await openBrowser()
const { context, page, faults } = await openWindow(browser)
const small = await openWindow(browser, { viewport: { width: 360, height: 740 }, hasTouch: true, isMobile: true })
const wanted = (name) => only.length === 0 || only.includes(name)

await page.goto('/sign-in')
await page.waitForSelector('form')
if (wanted('sign-in')) await screen(page, 'sign-in')
for (const p of [page, small.page]) {
  await p.goto('/sign-in')
  await p.getByLabel('E-mail').fill('ada@example.org')
  await p.getByLabel('Password').fill('correct horse')
  await p.getByRole('button', { name: 'Sign in' }).click()
  await p.waitForURL('**/orgs/ada')
}
const screens = {
  workloads: ['/orgs/ada', (p) => p.getByText('Everything else').waitFor()],
  deploy: ['/orgs/ada/deploy', (p) => p.getByRole('radio', { name: /Hello/ }).waitFor({ state: 'attached' })],
  overview: ['/orgs/ada/workloads/swift-otter', (p) => p.getByText('How it started').waitFor()],
  failed: ['/orgs/ada/workloads/mail-sorter', (p) => p.getByText('It does not run').waitFor()],
  logs: ['/orgs/ada/workloads/swift-otter/logs', (p) => p.getByText('listening on').first().waitFor()],
  terminal: ['/orgs/ada/workloads/swift-otter/terminal', async (p) => { await p.locator('[data-status=open]').waitFor(); await p.keyboard.type('/hello\n'); await p.waitForTimeout(300) }],
  events: ['/orgs/ada/workloads/swift-otter/events', (p) => p.getByText('answers.').waitFor()],
  config: ['/orgs/ada/workloads/swift-otter/config', (p) => p.getByRole('heading', { name: 'Environment variables' }).waitFor()],
  releases: ['/orgs/ada/workloads/swift-otter/releases', (p) => p.getByText('Release 2').waitFor()],
  secrets: ['/orgs/ada/secrets', (p) => p.getByText('SLACK_TOKEN').waitFor()],
  'api-keys': ['/orgs/ada/api-keys', (p) => p.getByText('deploy from CI').waitFor()],
  members: ['/orgs/ada/members', (p) => p.getByText('grace@example.org').first().waitFor()],
  activity: ['/orgs/ada/activity', (p) => p.getByText('answers.').first().waitFor()],
  account: ['/account', (p) => p.getByText('this browser').waitFor()],
  missing: ['/orgs/ada/workloads/nothing-here', (p) => p.getByRole('heading', { name: 'Not found' }).waitFor()],
}
for (const [name, [path, ready]] of Object.entries(screens)) {
  if (!wanted(name)) continue
  for (const [p, suffix] of [[page, ''], [small.page, '-360']]) {
    await p.goto(path)
    await ready(p)
    await screen(p, name + suffix)
  }
}
if (wanted('palette')) {
  await page.goto('/orgs/ada')
  await page.getByText('Everything else').waitFor()
  await page.keyboard.press('Control+k')
  await page.getByPlaceholder('Search workloads, pages').waitFor()
  await screen(page, 'palette', { cls: false })
  await page.keyboard.press('Escape')
  await page.getByPlaceholder('Search workloads, pages').waitFor({ state: 'detached' })
  await page.keyboard.press('?')
  await page.getByRole('heading', { name: 'Keyboard shortcuts' }).waitFor()
  await screen(page, 'shortcuts', { cls: false })
  await page.keyboard.press('Escape')
  await page.getByRole('button', { name: /account menu/ }).click()
  await page.getByRole('menuitem', { name: 'Sign out' }).waitFor()
  await screen(page, 'user-menu', { cls: false })
  await page.keyboard.press('Escape')
  await small.page.goto('/orgs/ada')
  await small.page.getByRole('button', { name: 'Open navigation' }).click()
  await small.page.getByRole('link', { name: 'Secrets' }).waitFor()
  await screen(small.page, 'drawer-360', { cls: false })
}
if (wanted('progress')) {
  await page.goto('/orgs/ada/deploy')
  await page.getByRole('radio', { name: /OpenClaw/ }).check({ force: true })
  await page.getByRole('button', { name: 'Deploy', exact: true }).click()
  await page.getByRole('heading', { name: /is running/ }).waitFor()
  await screen(page, 'progress-done', { cls: false })
  await page.goto('/orgs/ada/deploy')
  await page.getByRole('radio', { name: /Any image/ }).check({ force: true })
  await page.getByLabel('Image', { exact: true }).fill('ghcr.io/acme/agent:1')
  await screen(page, 'deploy-image', { cls: false })
  await page.getByRole('button', { name: 'Deploy', exact: true }).click()
  await page.waitForTimeout(1500)
  await screen(page, 'progress-pending', { cls: false })
}
if (wanted('dialogs')) {
  await page.goto('/orgs/ada/workloads/swift-otter/config')
  await page.getByRole('button', { name: 'Paste .env' }).click()
  await page.getByLabel('Contents').fill('LOG_LEVEL=debug\nexport ANTHROPIC_API_KEY="sk-ant-1234"\nFEATURES=a,b')
  await screen(page, 'paste-env', { cls: false })
  await page.getByRole('button', { name: /^Add/ }).last().click()
  await page.getByText('not applied yet').waitFor()
  await screen(page, 'config-changed', { cls: false })
  await page.getByRole('button', { name: 'Review and apply' }).click()
  await page.getByRole('button', { name: /Apply \d/ }).waitFor()
  await screen(page, 'review', { cls: false })
  await page.keyboard.press('Escape')
  await page.getByRole('button', { name: /More actions/ }).click()
  await page.getByRole('menuitem', { name: 'Delete…' }).click()
  await page.getByRole('button', { name: 'Delete workload' }).waitFor()
  await screen(page, 'delete', { cls: false })
}
await check('no console errors, no policy reports', async () => {
  const all = [...faults, ...small.faults].filter((f) => !/404/.test(f))
  expect(all.length === 0, all.join('\n'))
})
await context.close()
await close()
finish()
