// Drives the hub with clients of Node: undici's ProxyAgent (fetch) and socks-proxy-agent (node:http).
// usage: node clients.mjs PROXY ORIGIN USER KEY; prints "fine", or fails.
import assert from 'node:assert/strict'
import http from 'node:http'
import { inspect } from 'node:util'
import { SocksProxyAgent } from 'socks-proxy-agent'
import { ProxyAgent, fetch } from 'undici'

const [proxy, origin, user, key] = process.argv.slice(2)
const url = `http://${origin}/path?q=1`
const named = `http://localhost:${origin.split(':')[1]}/`
const body = 'y'.repeat(50_000)
const token = `Basic ${Buffer.from(`${user}:${key}`).toString('base64')}`

// undici: by CONNECT, and in absolute form.
for (const proxyTunnel of [true, false]) {
  const dispatcher = new ProxyAgent({ uri: `http://${proxy}`, token, proxyTunnel })
  for (const target of [url, named]) {
    const answers = await Promise.all(
      Array.from({ length: 8 }, async () => {
        const answer = await fetch(target, { dispatcher, method: 'POST', body })
        return [answer.status, await answer.text()]
      }),
    )
    for (const [status, text] of answers) {
      assert.equal(status, 200)
      assert.match(text, /^from 127\./)
      assert.match(text, /body 50000/)
      assert.doesNotMatch(text, /proxy-/i)
    }
  }
  await dispatcher.close()
}

// A wrong key is told as such, by CONNECT as an error that names the status.
const wrong = new ProxyAgent({ uri: `http://${proxy}`, token: 'Basic YWxpY2U6bm9wZQ==', proxyTunnel: true })
await assert.rejects(fetch(url, { dispatcher: wrong }), (error) => /407/.test(inspect(error)))
await wrong.close()

// socks-proxy-agent: names resolved by the exit (socks5h) and here (socks5), one agent for many requests.
const request = (agent, target) =>
  new Promise((resolve, reject) => {
    const sent = http.request(target, { agent, method: 'POST', timeout: 10_000 }, (answer) => {
      let text = ''
      answer.setEncoding('utf8')
      answer.on('data', (part) => (text += part))
      answer.on('end', () => resolve([answer.statusCode, text]))
      answer.on('error', reject)
    })
    sent.on('error', reject)
    sent.end(body)
  })
for (const scheme of ['socks5h', 'socks5']) {
  const agent = new SocksProxyAgent(`${scheme}://${user}:${key}@${proxy}`)
  for (const target of [url, ...(scheme === 'socks5h' ? [named] : [])]) {
    for (const [status, text] of await Promise.all(Array.from({ length: 8 }, () => request(agent, target)))) {
      assert.equal(status, 200)
      assert.match(text, /^from 127\./)
      assert.match(text, /body 50000/)
    }
  }
  agent.destroy()
}
const stranger = new SocksProxyAgent(`socks5h://${user}:nope@${proxy}`)
await assert.rejects(request(stranger, url), /authentication/i)

console.log('fine')
process.exit(0)
