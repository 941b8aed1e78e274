import { CircleAlert, CircleCheck, X } from 'lucide-react'
import { useSyncExternalStore } from 'react'
import { cn } from '@/lib/cn'
import { asApiError } from '@/lib/problem'
import { Button } from './button'

interface ToastItem {
  id: number
  tone: 'ok' | 'bad'
  title: string
  detail?: string | undefined
  action?: { label: string; run: () => void } | undefined
}

let items: readonly ToastItem[] = []
let nextId = 1
const listeners = new Set<() => void>()
const timers = new Map<number, ReturnType<typeof setTimeout>>()

function set(next: readonly ToastItem[]): void {
  items = next
  for (const listener of listeners) listener()
}

function dismiss(id: number): void {
  clearTimeout(timers.get(id))
  timers.delete(id)
  set(items.filter((item) => item.id !== id))
}

function show(toast: Omit<ToastItem, 'id'>, ms: number): void {
  const id = nextId++
  set([...items.slice(-3), { ...toast, id }])
  timers.set(id, setTimeout(() => dismiss(id), ms))
}

export const toast = {
  ok: (title: string, detail?: string, action?: ToastItem['action']) => show({ tone: 'ok', title, detail, action }, action ? 8_000 : 4_000),
  bad: (title: string, detail: string) => show({ tone: 'bad', title, detail }, 6_000),
  /** Errors stay long enough to copy the request id. */
  error: (title: string, error: unknown) => {
    const problem = asApiError(error)
    const id = problem.requestId ? ` · ${problem.requestId}` : ''
    show({ tone: 'bad', title, detail: `${problem.message}${problem.hint ? ` ${problem.hint}` : ''} (${problem.code}${id})` }, 12_000)
  },
}

export function Toaster() {
  const list = useSyncExternalStore(
    (listener) => {
      listeners.add(listener)
      return () => listeners.delete(listener)
    },
    () => items,
  )
  return (
    <section aria-label="Notifications" aria-live="polite" className="pointer-events-none fixed right-4 bottom-4 z-50 flex w-[calc(100vw-2rem)] max-w-sm flex-col gap-2">
      {list.map((item) => (
        <div key={item.id} className="pointer-events-auto flex animate-rise items-start gap-3 rounded-xl border border-line bg-panel p-3 pl-3.5 shadow-float">
          {item.tone === 'ok' ? (
            <CircleCheck className="mt-0.5 size-4 shrink-0 text-ok-ink" aria-hidden="true" />
          ) : (
            <CircleAlert className="mt-0.5 size-4 shrink-0 text-bad-ink" aria-hidden="true" />
          )}
          <div className="min-w-0 flex-1">
            <p className="text-sm font-medium">{item.title}</p>
            {item.detail && <p className={cn('mt-0.5 text-xs break-words text-muted')}>{item.detail}</p>}
          </div>
          {item.action && (
            <Button
              size="sm"
              onClick={() => {
                item.action?.run()
                dismiss(item.id)
              }}
            >
              {item.action.label}
            </Button>
          )}
          <Button size="icon-sm" variant="ghost" aria-label="Dismiss" className="-m-1" onClick={() => dismiss(item.id)}>
            <X aria-hidden="true" />
          </Button>
        </div>
      ))}
    </section>
  )
}
