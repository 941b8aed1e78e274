import { type ReactNode, useEffect, useState } from 'react'
import { Spinner } from '@/components/ui/button'
import { streams } from '@/lib/api'
import { stripAnsi } from '@/lib/ansi'
import { LogResume } from '@/lib/log-resume'
import { openEventStream } from '@/lib/sse'
import type { LogLine } from '@/lib/types'

/** The last few lines, live: proof that it runs, or its last words. */
export function LogPreview({ org, workload, instance, tail = [], lines: keep = 8, aside }: { org: string; workload: string; instance: string | null; tail?: readonly string[]; lines?: number; aside?: ReactNode }) {
  const [lines, setLines] = useState<readonly string[]>([])
  const [status, setStatus] = useState('connecting')
  useEffect(() => {
    if (instance === null) return
    const resume = new LogResume()
    const stream = openEventStream({
      url: streams.logs(org, workload),
      query: { follow: 'true', tail: String(keep) },
      events: ['log'],
      onEvent: (_, data, id) => {
        if (!resume.accept(id)) return
        setLines((before) => [...before, stripAnsi((data as LogLine).line)].slice(-keep))
      },
      onStatus: (next) => {
        if (next.kind === 'live') resume.reconnected()
        setStatus(next.kind)
      },
    })
    return () => stream.close()
  }, [org, workload, instance, keep])
  const shown = lines.length > 0 ? lines : tail.slice(-keep)
  return (
    <div className="border-t border-line bg-term px-4 py-3 font-mono text-xs leading-5 text-[oklch(0.9_0.004_60)]" role="region" aria-label="Latest log lines" data-testid="log-preview">
      {aside && (
        <div className="mb-1.5 flex items-center justify-between gap-4 font-sans text-2xs text-[oklch(0.72_0.006_60)]">
          <p>Latest from its log</p>
          {aside}
        </div>
      )}
      <div className={keep > 6 ? 'min-h-40' : 'min-h-30'}>
        {shown.map((line, index) => (
          <p key={index} className="truncate">
            {line || '\u00a0'}
          </p>
        ))}
        {shown.length === 0 && (
          <p className="flex items-center gap-2 text-[oklch(0.72_0.006_60)]">
            {instance === null || status === 'ended' ? 'It has written nothing.' : (<><Spinner /> Waiting for its first log line…</>)}
          </p>
        )}
      </div>
    </div>
  )
}
