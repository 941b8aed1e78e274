// Drives the console in Chromium against a running `clawhq up`, from sign-up to delete, as a person would.
//
//   BASE_URL=http://127.0.0.1:4180 [SCREENSHOT_DIR=shots] node e2e/run.mjs
//
// It makes a user of its own and leaves nothing behind but that user. The last line says `N passed, N failed`.
import { BASE_URL, check, expect, expecting, finish, openBrowser, openWindow, screen, tabTo } from './harness.mjs'

if (!BASE_URL) {
  console.error('BASE_URL is missing: start `clawhq up` and say where it answers, such as BASE_URL=http://127.0.0.1:4180')
  process.exit(2)
}

// A container may start from cold on a busy machine; nothing here waits for longer than it must.
const SLOW = 90_000
const stamp = Date.now().toString(36)
const PASSWORD = `drive-${stamp}-password`
const person = (name) => `${name}${stamp}@example.org`
const byName = (page, role, name) => page.getByRole(role, { name, exact: true })
const orgOf = (page) => new URL(page.url()).pathname.split('/')[2]

const { browser, close } = await openBrowser()
const { context, page, faults } = await openWindow(browser)
const name = `e2e-${stamp}`
let org = ''

async function signUp(window, email) {
  await window.goto('/sign-up')
  await window.getByLabel('E-mail').fill(email)
  await window.getByLabel('Password').fill(PASSWORD)
  await byName(window, 'button', 'Create account').click()
  await window.waitForURL('**/orgs/*/deploy**')
}
const state = (wanted) => page.locator(`[data-testid=state][data-state=${wanted}]`).waitFor({ timeout: SLOW })
const tab = async (label) => {
  await page.getByRole('navigation', { name: 'Workload' }).getByRole('link', { name: label }).click()
}

try {
  // --- Strangers ---
  await check('a stranger is led to the sign-in page and back', async () => {
    await expecting(page, /401/, async () => {
      await page.goto('/orgs/nobody/secrets')
      await page.waitForURL('**/sign-in?next=**')
      await page.getByRole('heading', { name: 'Sign in' }).waitFor()
    })
  })
  await screen(page, 'sign-in')
  await check('wrong credentials are refused with a code and a request id', async () => {
    await page.getByLabel('E-mail').fill(person('nobody'))
    await page.getByLabel('Password').fill('not the password')
    await expecting(page, /401/, async () => {
      await byName(page, 'button', 'Sign in').click()
      await page.getByRole('alert').waitFor()
    })
    const text = await page.getByRole('alert').innerText()
    expect(/req_/.test(text), `no request id in: ${text}`)
  })
  await screen(page, 'sign-in-refused')
  await check('sign-up says what is wrong while nothing is sent', async () => {
    await page.goto('/sign-up')
    await page.getByLabel('E-mail').fill('nope')
    await page.getByLabel('Password').fill('short')
    await byName(page, 'button', 'Create account').click()
    await page.getByText('That is not an e-mail address').waitFor()
    await page.getByText('At least 8 characters').waitFor()
  })
  await screen(page, 'sign-up-problems', { cls: false })
  await page.goto('/sign-up')
  await page.getByLabel('E-mail').waitFor()
  await screen(page, 'sign-up')

  // --- Sign up and deploy ---
  let t0 = 0
  await check('sign-up lands in the first deploy, with Hello chosen and a name filled in', async () => {
    t0 = performance.now()
    await signUp(page, person('drive'))
    org = orgOf(page)
    await page.getByRole('heading', { name: 'Deploy your first agent' }).waitFor()
    await page.getByRole('radio', { name: /Hello/ }).waitFor({ state: 'attached' })
    expect(await page.getByRole('radio', { name: /Hello/ }).isChecked(), 'Hello is not chosen')
    expect((await byName(page, 'textbox', 'Name').inputValue()).length > 2, 'no name is filled in')
    await page.locator('input[name=tier]:checked').waitFor({ state: 'attached' })
    await page.getByText(`/v1/orgs/${org}/workloads`).waitFor()
  })
  await screen(page, 'first-deploy')
  await check('deploy shows its named steps with milliseconds and its placement', async () => {
    await byName(page, 'textbox', 'Name').fill(name)
    await byName(page, 'button', 'Deploy').click()
    await page.getByRole('heading', { name: `${name} is running` }).waitFor({ timeout: SLOW })
    console.log(`      sign-up to running agent: ${Math.round(performance.now() - t0)} ms`)
    const steps = await page.getByTestId('deploy-steps').getByRole('listitem').allInnerTexts()
    expect(steps.length >= 2, `only ${steps.length} steps`)
    for (const step of steps) expect(/[A-Za-z]{3}[\s\S]*\d(\.\d)? (ms|s)/.test(step), `no name or time in: ${step}`)
    const total = await page.getByTestId('deploy-total').innerText()
    expect(/\d (ms|s)/.test(total) && /warm|cold/.test(total), `no total or placement in: ${total}`)
    console.log(`      ${total.replaceAll('\n', ' ')}: ${steps.map((s) => s.replaceAll('\n', ' ')).join(', ')}`)
  })
  await check('the first log line stands beside them', async () => {
    await page.getByTestId('log-preview').getByRole('paragraph').first().waitFor()
    await page.waitForFunction(() => !document.querySelector('[data-testid=log-preview]')?.textContent?.includes('Waiting for its first'))
  })
  await screen(page, 'deploy-done', { cls: false })
  await check('its address answers in a new tab', async () => {
    const [agent] = await Promise.all([context.waitForEvent('page'), page.getByRole('link', { name: 'Open it' }).click()])
    await agent.waitForLoadState()
    const answer = await agent.evaluate(() => document.body.innerText)
    expect(agent.url().includes(`${name}-${org}.`), `opened ${agent.url()}`)
    expect(answer.trim().length > 0, 'the page is empty')
    await agent.close()
  })

  // --- The list and the workload ---
  await check('the list shows it running, and the connection is live', async () => {
    // As when a workload's address is cut short.
    await page.goto(`/orgs/${org}/workloads`)
    await page.getByRole('link', { name, exact: true }).waitFor()
    expect(new URL(page.url()).pathname === `/orgs/${org}`, page.url())
    await page.locator('aside [data-testid=connection][data-status=live]').waitFor()
  })
  await screen(page, 'workloads')
  await check('a search that matches nothing says so, and the filter lives in the address', async () => {
    await page.getByLabel('Search workloads').fill('zzz')
    await page.getByRole('heading', { name: 'Nothing matches' }).waitFor()
    expect(new URL(page.url()).searchParams.get('q') === 'zzz', page.url())
    await byName(page, 'button', 'Clear the filter').click()
    await page.getByRole('link', { name, exact: true }).waitFor()
  })
  await check('the overview names state, address and how it started', async () => {
    await page.goto(`/orgs/${org}/workloads/${name}`)
    await page.getByRole('heading', { name: 'Running and answering' }).waitFor()
    await page.getByRole('heading', { name: 'How it started' }).waitFor()
    // After the words above it.
    await page.getByTestId('log-preview').getByRole('paragraph').nth(1).waitFor()
    await page.getByText('Recorded', { exact: true }).waitFor()
  })
  await screen(page, 'overview')

  await check('logs appear, pause and follow by a person’s will, and can be searched', async () => {
    await tab('Logs')
    const lines = page.getByTestId('log-lines')
    await lines.locator('[data-index]').first().waitFor()
    expect((await lines.getAttribute('data-follow')) === 'true', 'does not follow')
    await byName(page, 'button', 'Pause').click()
    expect((await lines.getAttribute('data-follow')) === 'false', 'does not pause')
    await page.getByRole('button', { name: /latest/ }).click()
    expect((await lines.getAttribute('data-follow')) === 'true', 'does not follow again')
    await page.getByLabel('Search the log').fill('no such line at all')
    await page.getByText('No line matches.').waitFor()
    await page.getByLabel('Search the log').fill('')
    const [download] = await Promise.all([page.waitForEvent('download'), page.getByRole('button', { name: 'Download the log' }).click()])
    expect(download.suggestedFilename().startsWith(name), download.suggestedFilename())
  })
  await screen(page, 'logs', { cls: false })

  await check('the terminal runs /hello', async () => {
    await tab('Terminal')
    await page.locator('[data-testid=terminal-status][data-status=open]').waitFor({ timeout: SLOW })
    await page.keyboard.type('/hello --version\n')
    await page.waitForFunction(() => /hello.*\d/i.test((document.querySelector('.xterm-accessibility-tree, .xterm-rows')?.textContent ?? '').replace('/hello --version', '')), undefined, { timeout: 20_000 })
  })
  await screen(page, 'terminal', { cls: false })
  await check('Ctrl+Shift+Escape leaves the terminal', async () => {
    await page.getByTestId('terminal').click()
    await page.keyboard.press('Control+Shift+Escape')
    expect(await page.evaluate(() => document.activeElement?.getAttribute('data-tab') === 'Terminal'), 'the focus is elsewhere')
  })

  await check('events tell what happened', async () => {
    await tab('Events')
    await page.locator('main li').first().waitFor()
  })
  await screen(page, 'events')

  // --- Config, secrets, releases ---
  await check('a .env file becomes variables and secrets, is reviewed, and applied', async () => {
    await tab('Config & secrets')
    await byName(page, 'button', 'Paste .env').click()
    await page.getByLabel('Contents').fill('LOG_LEVEL=debug\nexport MODEL_API_KEY="sk-drive-1234"\n')
    await byName(page, 'button', 'Add 1 variable and 1 secret').click()
    await page.getByText('2 changes').waitFor()
  })
  await screen(page, 'config-changed', { cls: false })
  await check('the server’s own diff shows secrets as names only', async () => {
    await byName(page, 'button', 'Review and apply').click()
    const dialog = page.getByRole('dialog')
    await dialog.getByText('LOG_LEVEL').waitFor()
    await dialog.getByText('MODEL_API_KEY').waitFor()
    expect(!(await dialog.innerText()).includes('sk-drive-1234'), 'the secret’s value is shown')
  })
  await screen(page, 'review', { cls: false })
  await check('applying makes release 2 and the workload runs again', async () => {
    await page.getByRole('dialog').getByRole('button', { name: /^Apply \d/ }).click()
    await page.getByRole('dialog').waitFor({ state: 'detached', timeout: SLOW })
    await state('running')
    await tab('Releases')
    await page.getByRole('heading', { name: 'Release 2' }).waitFor()
  })
  await screen(page, 'releases', { cls: false })
  await check('the secret is listed, gets a new version, and cannot be read', async () => {
    await page.goto(`/orgs/${org}/secrets`)
    await page.getByText('MODEL_API_KEY').first().waitFor()
    await page.getByRole('button', { name: 'New version of MODEL_API_KEY' }).click()
    await page.getByLabel('Value').fill('sk-drive-5678')
    await page.getByRole('dialog').getByRole('button', { name: 'Set secret' }).click()
    await page.getByText(/version 2, set/).waitFor()
    expect(!(await page.content()).includes('sk-drive-'), 'the value is in the page')
  })
  await screen(page, 'secrets', { cls: false })

  // --- Stop, start ---
  await check('stop stops it, and its pages say so', async () => {
    await page.goto(`/orgs/${org}/workloads/${name}`)
    await byName(page, 'button', 'Stop').click()
    await state('stopped')
    await page.getByRole('heading', { name: 'Stopped', exact: true }).waitFor()
  })
  await screen(page, 'overview-stopped', { cls: false })
  await check('a terminal of a stopped workload explains itself', async () => {
    await tab('Terminal')
    await page.getByRole('heading', { name: `${name} is stopped` }).waitFor()
  })
  await screen(page, 'terminal-stopped', { cls: false })
  await check('start starts it again', async () => {
    await page.getByRole('main').getByRole('button', { name: 'Start', exact: true }).click()
    await state('running')
  })
  await check('restart restarts it', async () => {
    await byName(page, 'button', 'Restart').click()
    await page.getByText(`Restarting ${name}`).waitFor()
    await state('running')
  })

  // --- Refusals ---
  await check('a taken name is refused in the form, at its field', async () => {
    await page.goto(`/orgs/${org}/deploy`)
    await byName(page, 'textbox', 'Name').fill(name)
    await page.getByText('There is one of that name already').waitFor()
  })
  await check('an image that does not exist fails with its reason and hint', async () => {
    await page.goto(`/orgs/${org}/deploy`)
    await page.getByRole('radio', { name: /Any image/ }).check({ force: true })
    await page.getByLabel('Image', { exact: true }).fill(`localhost:1/nothing/here:${stamp}`)
    await byName(page, 'textbox', 'Name').fill(`bad-${stamp}`)
    await byName(page, 'button', 'Deploy').click()
    await page.getByRole('heading', { name: `bad-${stamp} did not start` }).waitFor({ timeout: SLOW })
  })
  await screen(page, 'deploy-failed', { cls: false })
  await check('it leads the list, under “Needs attention”', async () => {
    await page.goto(`/orgs/${org}`)
    await page.getByRole('heading', { name: 'Needs attention' }).waitFor()
    await page.getByRole('link', { name: `bad-${stamp}`, exact: true }).first().waitFor()
  })
  await screen(page, 'workloads-attention')
  await check('its own page explains the failure', async () => {
    await page.goto(`/orgs/${org}/workloads/bad-${stamp}`)
    await page.getByRole('heading', { name: 'It does not run' }).waitFor()
  })
  await screen(page, 'overview-failed')
  await check('what does not exist is a page of its own, with the code and the request id', async () => {
    await expecting(page, /404/, async () => {
      await page.goto(`/orgs/${org}/workloads/none-of-ours`)
      await page.getByRole('heading', { name: 'Not found' }).waitFor()
    })
    await page.getByText(/req_/).waitFor()
  })
  await screen(page, 'not-found', { cls: false })

  // --- Org and account ---
  await check('an API key is shown once', async () => {
    await page.goto(`/orgs/${org}/api-keys`)
    await byName(page, 'button', 'New key').click()
    await byName(page, 'textbox', 'Name').fill('drive')
    await byName(page, 'button', 'Make key').click()
    const key = await page.getByTestId('api-key').innerText()
    expect(key.startsWith('chq_'), `the key is ${key.slice(0, 6)}…`)
    const answer = await fetch(`${BASE_URL}/v1/orgs/${org}/workloads`, { headers: { authorization: `Bearer ${key}` } })
    expect(answer.status === 200, `the key is answered ${answer.status}`)
  })
  await screen(page, 'api-key-made', { cls: false })
  await check('afterwards only its prefix is left', async () => {
    await byName(page, 'button', 'Done').click()
    await page.getByText('never used').or(page.getByText(/used /)).first().waitFor()
  })
  await screen(page, 'api-keys', { cls: false })
  for (const [path, text, shot] of [
    ['members', person('drive'), 'members'],
    ['activity', name, 'activity'],
  ]) {
    await check(`${path} is there`, async () => {
      await page.goto(`/orgs/${org}/${path}`)
      await page.getByRole('main').getByText(text).first().waitFor()
    })
    await screen(page, shot)
  }
  await check('the account lists this browser’s session', async () => {
    await page.goto('/account')
    await page.getByText('this browser').waitFor()
  })
  await screen(page, 'account')

  // --- Palette and shortcuts ---
  await check('Ctrl K finds the workload and goes to its logs', async () => {
    await page.goto(`/orgs/${org}`)
    await page.getByRole('link', { name, exact: true }).first().waitFor()
    await page.keyboard.press('Control+k')
    await page.getByPlaceholder(/Search workloads/).waitFor()
  })
  await screen(page, 'palette', { cls: false })
  await check('… by typing and Enter', async () => {
    await page.keyboard.type(`${name} logs`)
    await page.getByRole('option', { name: `${name}: logs` }).waitFor()
    await page.keyboard.press('Enter')
    await page.waitForURL(`**/workloads/${name}/logs`)
  })
  await check('? shows the shortcuts, g s goes to the secrets', async () => {
    await page.locator('main h1').focus()
    await page.keyboard.press('?')
    await page.getByRole('heading', { name: 'Keyboard shortcuts' }).waitFor()
  })
  await screen(page, 'shortcuts', { cls: false })
  await check('… and Escape closes them', async () => {
    await page.keyboard.press('Escape')
    await page.getByRole('dialog').waitFor({ state: 'detached' })
    await page.keyboard.press('g')
    await page.keyboard.press('s')
    await page.waitForURL(`**/orgs/${org}/secrets`)
  })
  await check('the theme is chosen from the menu and survives a reload', async () => {
    await page.getByRole('button', { name: /account menu/ }).click()
    await page.getByRole('menuitemradio', { name: 'Dark' }).click()
    await page.waitForFunction(() => document.documentElement.classList.contains('dark'))
    await page.reload()
    await page.getByRole('heading', { name: 'Secrets', exact: true }).waitFor()
    expect(await page.evaluate(() => document.documentElement.classList.contains('dark')), 'light again')
    await page.evaluate(() => localStorage.removeItem('clawhq.theme'))
  })

  // --- Narrow ---
  await check('at 360 px every screen fits', async () => {
    const phone = await context.newPage()
    await phone.setViewportSize({ width: 360, height: 740 })
    for (const [shot, path] of Object.entries({
      workloads: `/orgs/${org}`,
      deploy: `/orgs/${org}/deploy`,
      overview: `/orgs/${org}/workloads/${name}`,
      logs: `/orgs/${org}/workloads/${name}/logs`,
      config: `/orgs/${org}/workloads/${name}/config`,
      secrets: `/orgs/${org}/secrets`,
      'api-keys': `/orgs/${org}/api-keys`,
      members: `/orgs/${org}/members`,
      activity: `/orgs/${org}/activity`,
      account: '/account',
    })) {
      await phone.goto(path)
      await phone.locator('main h1').waitFor()
      await phone.waitForLoadState('load')
      await phone.locator('main [class*=animate-breathe][class*=bg-hover]').first().waitFor({ state: 'detached' })
      await screen(phone, `${shot}-360`, { cls: false })
    }
    await phone.getByRole('button', { name: 'Open navigation' }).click()
    await phone.getByRole('link', { name: 'Secrets' }).click()
    await phone.waitForURL('**/secrets')
    await phone.close()
  })

  // --- Many tabs ---
  await check('ten tabs are all live', async () => {
    const tabs = await Promise.all(
      Array.from({ length: 10 }, async () => {
        const another = await context.newPage()
        await another.goto(`/orgs/${org}`)
        return another
      }),
    )
    for (const another of tabs) {
      await another.getByRole('link', { name, exact: true }).first().waitFor()
      await another.locator('aside [data-testid=connection][data-status=live]').waitFor()
    }
    await Promise.all(tabs.map((another) => another.close()))
  })

  // --- Delete ---
  await check('delete wants the name typed, and takes it from the list', async () => {
    for (const victim of [`bad-${stamp}`, name]) {
      await page.goto(`/orgs/${org}/workloads/${victim}`)
      await page.getByRole('button', { name: /More actions/ }).click()
      await page.getByRole('menuitem', { name: 'Delete…' }).click()
      const dialog = page.getByRole('dialog')
      expect(await dialog.getByRole('button', { name: 'Delete workload' }).isDisabled(), 'can be deleted without typing')
      await dialog.getByLabel(/to confirm/).fill(victim)
      if (victim === name) await screen(page, 'delete', { cls: false })
      await dialog.getByRole('button', { name: 'Delete workload' }).click()
      await page.waitForURL(`**/orgs/${org}`)
    }
    await page.getByRole('heading', { name: 'Nothing runs here yet' }).waitFor({ timeout: SLOW })
  })
  await screen(page, 'workloads-empty', { cls: false })

  // --- Keyboard only ---
  await check('keyboard only: sign up, deploy, read the log, stop, delete', async () => {
    const hands = await openWindow(browser)
    const p = hands.page
    await p.goto('/sign-up')
    await p.getByLabel('E-mail').waitFor()
    await tabTo(p, 'textbox', 'E-mail')
    await p.keyboard.type(person('keys'))
    await p.keyboard.press('Tab')
    await p.keyboard.type(PASSWORD)
    await p.keyboard.press('Enter')
    await p.waitForURL('**/orgs/*/deploy**')
    await p.locator('input[name=tier]:checked').waitFor({ state: 'attached' })
    await tabTo(p, 'textbox', 'Name')
    await p.keyboard.press('Control+a')
    await p.keyboard.type(`keys-${stamp}`)
    await p.keyboard.press('Enter')
    await p.getByRole('heading', { name: `keys-${stamp} is running` }).waitFor({ timeout: SLOW })
    expect(await p.getByRole('link', { name: 'Open it' }).evaluate((e) => e === document.activeElement), 'the next action has no focus')
    await tabTo(p, 'link', 'Go to the workload')
    await p.keyboard.press('Enter')
    await p.waitForURL(`**/workloads/keys-${stamp}`)
    await tabTo(p, 'link', 'Logs')
    await p.keyboard.press('Enter')
    await p.waitForURL('**/logs')
    await p.getByTestId('log-lines').locator('[data-index]').first().waitFor()
    await tabTo(p, 'region', 'Log lines')
    await tabTo(p, 'link', 'Terminal', { key: 'Shift+Tab' })
    await p.keyboard.press('Enter')
    await p.locator('[data-testid=terminal-status][data-status=open]').waitFor({ timeout: SLOW })
    await p.keyboard.press('Control+Shift+Escape')
    await tabTo(p, 'button', 'Stop', { key: 'Shift+Tab' })
    await p.keyboard.press('Enter')
    await p.locator('[data-testid=state][data-state=stopped]').waitFor({ timeout: SLOW })
    await tabTo(p, 'button', /More actions/, { max: 120 })
    await p.keyboard.press('Enter')
    await p.getByRole('menuitem', { name: 'Delete…' }).waitFor()
    await p.keyboard.press('End')
    await p.keyboard.press('Enter')
    await tabTo(p, 'textbox', /to confirm/)
    await p.keyboard.type(`keys-${stamp}`)
    await p.keyboard.press('Enter')
    await p.getByRole('heading', { name: 'Nothing runs here yet' }).waitFor({ timeout: SLOW })
    expect(hands.faults.length === 0, hands.faults.join('\n'))
    await hands.context.close()
  })

  await check('signing out leaves nothing on screen', async () => {
    await page.goto('/account')
    await page.getByRole('main').getByRole('button', { name: 'Sign out', exact: true }).click()
    await page.waitForURL('**/sign-in')
    await expecting(page, /401/, async () => {
      await page.goto(`/orgs/${org}/secrets`)
      await page.waitForURL('**/sign-in?next=**')
    })
    expect(!(await page.content()).includes('MODEL_API_KEY'), 'a secret’s name is still there')
  })
} catch (error) {
  await check('the drive itself', () => Promise.reject(error))
} finally {
  await check('no console errors, no policy or Trusted Types reports, no page errors', async () => {
    expect(faults.length === 0, faults.join('\n      '))
  })
  await close()
  finish()
}
