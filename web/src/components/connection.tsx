import { useEffect, useState, useSyncExternalStore } from 'react'
import { useLiveStatus } from '@/lib/live'
import { Dot } from './ui/misc'

function useOnline(): boolean {
  return useSyncExternalStore(
    (listener) => {
      addEventListener('online', listener)
      addEventListener('offline', listener)
      return () => {
        removeEventListener('online', listener)
        removeEventListener('offline', listener)
      }
    },
    () => navigator.onLine,
    () => true,
  )
}

/** Whether what is shown is live, and if not, what happens instead. */
export function ConnectionBadge() {
  const status = useLiveStatus()
  const online = useOnline()
  const [now, setNow] = useState(() => Date.now())
  const retrying = status.kind === 'retrying'
  useEffect(() => {
    if (!retrying) return
    const timer = setInterval(() => setNow(Date.now()), 500)
    return () => clearInterval(timer)
  }, [retrying])
  let text = 'Live'
  let tone: 'ok' | 'warn' | 'bad' | 'idle' = 'ok'
  let title = 'Changes appear as they happen.'
  if (!online) {
    text = 'Offline'
    tone = 'bad'
    title = 'This computer has no network. What you see may be old.'
  } else if (status.kind === 'retrying') {
    const seconds = Math.max(0, Math.ceil((status.at - now) / 1000))
    text = seconds > 0 ? `Reconnecting in ${seconds} s` : 'Reconnecting…'
    tone = 'warn'
    title = 'The event stream broke off. Meanwhile everything is read every few seconds.'
  } else if (status.kind !== 'live') {
    text = 'Connecting…'
    tone = 'idle'
    title = 'Opening the event stream.'
  }
  return (
    <span className="inline-flex items-center gap-2 text-xs text-muted tabular" title={title} data-testid="connection" data-status={online ? status.kind : 'offline'}>
      <Dot tone={tone} busy={tone === 'warn'} />
      {text}
    </span>
  )
}
