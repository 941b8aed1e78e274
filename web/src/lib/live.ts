import { useQueryClient } from '@tanstack/react-query'
import { useEffect, useSyncExternalStore } from 'react'
import { streams } from './api'
import { keys } from './queries'
import { openEventStream, type StreamStatus } from './sse'
import type { EventItem, Workload } from './types'

// One event stream per org and browser, whatever the number of tabs: HTTP/1.1 allows six connections to an origin, and the
// seventh tab would hang. A Web Lock elects the tab that holds the stream; the others hear it over a BroadcastChannel.

type Wire = { type: 'event'; event: EventItem } | { type: 'status'; status: StreamStatus } | { type: 'gap' } | { type: 'hello' }

let status: StreamStatus = { kind: 'connecting' }
const statusListeners = new Set<() => void>()

function setStatus(next: StreamStatus): void {
  status = next
  for (const listener of statusListeners) listener()
}

export function useLiveStatus(): StreamStatus {
  return useSyncExternalStore(
    (listener) => {
      statusListeners.add(listener)
      return () => statusListeners.delete(listener)
    },
    () => status,
  )
}

export function isLive(): boolean {
  return status.kind === 'live'
}

/** Keeps the org's queries fresh from its event stream for as long as the component is mounted; without an org it does nothing. */
export function useOrgEvents(org: string | undefined): void {
  const client = useQueryClient()
  useEffect(() => {
    if (org === undefined) return
    const stale = new Set<string>()
    let timer: ReturnType<typeof setTimeout> | undefined
    let lastId = ''
    let stream: { close: () => void } | undefined
    let stop: (() => void) | undefined
    let gone = false

    // Events are hints: what changed is read from the API. A burst becomes one refetch.
    const flush = () => {
      timer = undefined
      void client.invalidateQueries({ queryKey: keys.workloads(org) })
      void client.invalidateQueries({ queryKey: keys.events(org) })
      const list = client.getQueryData<Workload[]>(keys.workloads(org)) ?? []
      // A workload this tab has not seen yet, or an event of the org as a whole: everything of the org is read again.
      const names = [...stale].map((id) => list.find((w) => w.id === id)?.name)
      for (const name of names.includes(undefined) ? [undefined] : names) void client.invalidateQueries({ queryKey: name === undefined ? ['workload', org] : keys.workload(org, name) })
      stale.clear()
    }
    const refresh = (id: string) => {
      stale.add(id)
      timer ??= setTimeout(flush, 120)
    }
    const hear = (message: Wire) => {
      if (message.type === 'event') {
        lastId = String(message.event.seq)
        refresh(message.event.workload_id ?? '*')
      } else if (message.type === 'gap') refresh('*')
      else if (message.type === 'status') {
        // What happened while the stream was away is unknown: read everything again.
        if (message.status.kind === 'live' && status.kind === 'retrying') refresh('*')
        setStatus(message.status)
      }
    }

    const channel = typeof BroadcastChannel === 'function' ? new BroadcastChannel(`clawhq.events.${org}`) : undefined
    const publish = (message: Wire) => {
      hear(message)
      channel?.postMessage(message)
    }
    channel?.addEventListener('message', (event: MessageEvent<Wire>) => {
      if (event.data.type === 'hello') {
        if (stream) channel.postMessage({ type: 'status', status } satisfies Wire)
      } else hear(event.data)
    })
    channel?.postMessage({ type: 'hello' } satisfies Wire)

    const lead = () => {
      stream = openEventStream({
        url: streams.orgEvents(org),
        events: ['event'],
        ...(lastId ? { after: lastId } : {}),
        onEvent: (_, data) => publish({ type: 'event', event: data as EventItem }),
        onGap: () => publish({ type: 'gap' }),
        onStatus: (next) => publish({ type: 'status', status: next }),
      })
    }
    setStatus({ kind: 'connecting' })
    if (navigator.locks && channel) {
      const abort = new AbortController()
      navigator.locks
        .request(`clawhq.events.${org}`, { signal: abort.signal }, () => {
          if (gone) return undefined
          lead()
          return new Promise<void>((resolve) => {
            stop = resolve
          })
        })
        .catch(() => {
          // Aborted on unmount while waiting for the lock.
        })
      const inner = () => abort.abort()
      return () => {
        gone = true
        clearTimeout(timer)
        stream?.close()
        stop?.()
        inner()
        channel.close()
      }
    }
    lead()
    return () => {
      clearTimeout(timer)
      stream?.close()
      channel?.close()
    }
  }, [org, client])
}
