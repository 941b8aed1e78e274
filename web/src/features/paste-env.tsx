import { useState } from 'react'
import { Button } from '@/components/ui/button'
import { Dialog } from '@/components/ui/dialog'
import { Field, Textarea } from '@/components/ui/field'
import { ProblemNote } from '@/components/ui/problem'
import { api } from '@/lib/api'
import { type EnvPair, looksSecret, parseDotenv } from '@/lib/dotenv'
import { plural } from '@/lib/format'

/** Takes a whole .env file; what looks like a credential is proposed to be kept as a secret. */
export function PasteEnv({ org, onClose, onDone }: { org: string; onClose: () => void; onDone: (plain: EnvPair[], secretNames: string[]) => void }) {
  const [text, setText] = useState('')
  const [flipped, setFlipped] = useState<ReadonlySet<string>>(new Set())
  const [busy, setBusy] = useState(false)
  const [error, setError] = useState<unknown>(null)
  const { pairs, bad } = parseDotenv(text)
  const isSecret = (key: string) => looksSecret(key) !== flipped.has(key)
  // An empty value cannot be a secret.
  const secret = pairs.filter((p) => isSecret(p.key) && p.value !== '')
  const plain = pairs.filter((p) => !secret.includes(p))
  const save = async () => {
    setBusy(true)
    setError(null)
    try {
      for (const pair of secret) await api.setSecret(org, pair.key, pair.value)
      onDone(
        plain,
        secret.map((p) => p.key),
      )
    } catch (e) {
      setError(e)
      setBusy(false)
    }
  }
  return (
    <Dialog
      open
      onOpenChange={(open) => {
        if (!open && !busy) onClose()
      }}
      title="Paste a .env file"
      description="Names that look like credentials become secrets: sealed, and never readable again."
      size="lg"
      footer={
        <>
          <Button onClick={onClose}>Cancel</Button>
          <Button variant="primary" disabled={pairs.length === 0 || bad.length > 0} busy={busy} onClick={() => void save()}>
            {pairs.length === 0 ? 'Add' : `Add ${[plain.length > 0 ? plural(plain.length, 'variable') : '', secret.length > 0 ? plural(secret.length, 'secret') : ''].filter(Boolean).join(' and ')}`}
          </Button>
        </>
      }
    >
      <div className="space-y-4">
        <Field label="Contents" error={bad.length > 0 ? `Line ${bad.join(', ')}: not KEY=value` : undefined}>
          <Textarea value={text} onChange={(event) => setText(event.target.value)} rows={7} spellCheck={false} autoCapitalize="off" className="font-mono text-xs!" placeholder={'LOG_LEVEL=info\nOPENAI_API_KEY=sk-…'} />
        </Field>
        {pairs.length > 0 && (
          <ul className="max-h-56 divide-y divide-line overflow-y-auto rounded-lg border border-line">
            {pairs.map((pair) => (
              <li key={pair.key} className="flex items-center gap-3 px-3 py-1.5 text-xs">
                <code className="min-w-0 flex-1 truncate font-mono">{pair.key}</code>
                <span className="max-w-40 min-w-0 truncate font-mono text-muted max-sm:hidden">{isSecret(pair.key) ? '••••••••' : pair.value}</span>
                <label className="flex shrink-0 items-center gap-1.5">
                  <input
                    type="checkbox"
                    checked={isSecret(pair.key)}
                    className="size-3.5 accent-(--accent)"
                    onChange={() =>
                      setFlipped((before) => {
                        const next = new Set(before)
                        if (!next.delete(pair.key)) next.add(pair.key)
                        return next
                      })
                    }
                  />
                  secret<span className="sr-only"> {pair.key}</span>
                </label>
              </li>
            ))}
          </ul>
        )}
        {error !== null && <ProblemNote error={error} />}
      </div>
    </Dialog>
  )
}
