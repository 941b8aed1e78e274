import { useQuery, useQueryClient } from '@tanstack/react-query'
import { ClipboardPaste, FileCode2, LockKeyhole, Plus, Trash2 } from 'lucide-react'
import { useState } from 'react'
import { Button } from '@/components/ui/button'
import { Input, Select } from '@/components/ui/field'
import { Card, CardTitle, CopyButton, Skeleton } from '@/components/ui/misc'
import { ProblemNote } from '@/components/ui/problem'
import { toast } from '@/components/ui/toast'
import { configOf, countChanges, type Draft, draftOf, draftProblems, rowId } from '@/lib/config'
import { parseDotenv } from '@/lib/dotenv'
import { cn } from '@/lib/cn'
import { mib, plural } from '@/lib/format'
import { keys, secretsQuery, workloadQuery } from '@/lib/queries'
import { useTitle } from '@/lib/title'
import type { Workload } from '@/lib/types'
import { PasteEnv } from './paste-env'
import { ReviewChanges } from './review-changes'
import { SecretDialog } from './secret-dialog'

export function ConfigTab({ org, name }: { org: string; name: string }) {
  useTitle('Config', name)
  const { data: workload } = useQuery(workloadQuery(org, name))
  if (!workload)
    return (
      <div className="space-y-4">
        <Skeleton className="h-56 rounded-xl" />
        <Skeleton className="h-40 rounded-xl" />
      </div>
    )
  return <Editor key={workload.release.id} org={org} workload={workload} />
}

function Editor({ org, workload }: { org: string; workload: Workload }) {
  const base = workload.release.config
  const [draft, setDraft] = useState<Draft>(() => draftOf(base))
  const [pasting, setPasting] = useState(false)
  const [reviewing, setReviewing] = useState(false)
  const [making, setMaking] = useState(false)
  const client = useQueryClient()
  const secrets = useQuery(secretsQuery(org))
  const problems = draftProblems(draft)
  const changes = countChanges(draft, base)

  const setEnv = (id: number, patch: { key?: string; value?: string }) => setDraft((d) => ({ ...d, env: d.env.map((row) => (row.id === id ? { ...row, ...patch } : row)) }))
  const merge = (pairs: { key: string; value: string }[]) =>
    setDraft((d) => {
      const env = d.env.filter((row) => row.key !== '' || row.value !== '').map((row) => ({ ...row, value: pairs.find((p) => p.key === row.key)?.value ?? row.value }))
      for (const pair of pairs) if (!env.some((row) => row.key === pair.key)) env.push({ id: rowId(), ...pair })
      return { ...d, env }
    })
  const refer = (names: string[]) =>
    setDraft((d) => ({
      env: d.env.filter((row) => !names.includes(row.key)),
      secrets: [...d.secrets, ...names.filter((n) => !d.secrets.some((row) => row.name === n && row.target === 'env')).map((n) => ({ id: rowId(), name: n, target: 'env' as const, where: n }))],
    }))
  const addEnv = () => {
    const id = rowId()
    setDraft((d) => ({ ...d, env: [...d.env, { id, key: '', value: '' }] }))
    requestAnimationFrame(() => document.getElementById(`env-${id}`)?.focus())
  }
  const addSecret = (name = '') => setDraft((d) => ({ ...d, secrets: [...d.secrets, { id: rowId(), name, target: 'env', where: name }] }))

  return (
    <div className="space-y-4 pb-16">
      <Card>
        <CardTitle
          aside={
            <Button size="sm" onClick={() => setPasting(true)}>
              <ClipboardPaste aria-hidden="true" />
              Paste .env
            </Button>
          }
        >
          Environment variables
        </CardTitle>
        <div className="p-4">
          {draft.env.length === 0 && <p className="mb-3 text-sm text-muted">None of its own. Paste a whole .env file into any field, or add them one by one.</p>}
          <ul className="space-y-2">
            {draft.env.map((row) => (
              <li key={row.id}>
                <div className="flex items-start gap-2 max-sm:flex-wrap">
                  <Input
                    id={`env-${row.id}`}
                    aria-label="Variable name"
                    aria-invalid={problems.has(row.id) || undefined}
                    aria-describedby={problems.has(row.id) ? `why-${row.id}` : undefined}
                    value={row.key}
                    placeholder="NAME"
                    spellCheck={false}
                    autoCapitalize="off"
                    className="font-mono text-xs! sm:w-2/5!"
                    onChange={(event) => setEnv(row.id, { key: event.target.value })}
                    onPaste={(event) => {
                      const text = event.clipboardData.getData('text')
                      if (!/[\n=]/.test(text)) return
                      const { pairs } = parseDotenv(text)
                      if (pairs.length === 0) return
                      event.preventDefault()
                      merge(pairs)
                    }}
                  />
                  <Input aria-label={`Value of ${row.key || 'the variable'}`} value={row.value} placeholder="value" spellCheck={false} className="min-w-0 flex-1 font-mono text-xs!" onChange={(event) => setEnv(row.id, { value: event.target.value })} />
                  <Button size="icon" variant="ghost" aria-label={`Remove ${row.key || 'the empty variable'}`} onClick={() => setDraft((d) => ({ ...d, env: d.env.filter((r) => r.id !== row.id) }))}>
                    <Trash2 aria-hidden="true" />
                  </Button>
                </div>
                {problems.has(row.id) && (
                  <p id={`why-${row.id}`} className="mt-1 text-xs text-bad-ink">
                    {problems.get(row.id)}
                  </p>
                )}
              </li>
            ))}
          </ul>
          <Button size="sm" variant="ghost" className={cn('-ml-2', draft.env.length > 0 && 'mt-2')} onClick={addEnv}>
            <Plus aria-hidden="true" />
            Add a variable
          </Button>
        </div>
      </Card>

      <Card>
        <CardTitle
          aside={
            <Button size="sm" onClick={() => setMaking(true)}>
              <LockKeyhole aria-hidden="true" />
              New secret
            </Button>
          }
        >
          Secrets
        </CardTitle>
        <div className="p-4">
          <p className="mb-3 text-sm text-muted">References to the organisation’s secrets. A release takes the newest version of each; the values never appear here, in the log or in the image.</p>
          <ul className="space-y-2">
            {draft.secrets.map((row) => (
              <li key={row.id}>
                <div className="flex items-start gap-2 max-sm:flex-wrap">
                  <Select aria-label="Secret" className="sm:w-2/5!" value={row.name} onChange={(event) => setDraft((d) => ({ ...d, secrets: d.secrets.map((r) => (r.id === row.id ? { ...r, name: event.target.value, where: r.target === 'env' && (r.where === '' || r.where === r.name) ? event.target.value : r.where } : r)) }))}>
                    <option value="">Choose a secret…</option>
                    {row.name !== '' && !secrets.data?.some((s) => s.name === row.name) && <option value={row.name}>{row.name}</option>}
                    {secrets.data?.map((s) => (
                      <option key={s.id} value={s.name}>
                        {s.name} (version {s.version})
                      </option>
                    ))}
                  </Select>
                  <Select aria-label={`How ${row.name || 'the secret'} is given`} className="w-28! shrink-0" value={row.target} onChange={(event) => setDraft((d) => ({ ...d, secrets: d.secrets.map((r) => (r.id === row.id ? { ...r, target: event.target.value as 'env' | 'file', where: event.target.value === 'file' ? `/run/secrets/${r.name.toLowerCase()}` : r.name } : r)) }))}>
                    <option value="env">variable</option>
                    <option value="file">file</option>
                  </Select>
                  <Input
                    aria-label={`${row.target === 'file' ? 'Path' : 'Variable'} of ${row.name || 'the secret'}`}
                    aria-invalid={problems.has(row.id) || undefined}
                    aria-describedby={problems.has(row.id) ? `why-${row.id}` : undefined}
                    value={row.where}
                    spellCheck={false}
                    className="min-w-0 flex-1 font-mono text-xs!"
                    onChange={(event) => setDraft((d) => ({ ...d, secrets: d.secrets.map((r) => (r.id === row.id ? { ...r, where: event.target.value } : r)) }))}
                  />
                  <Button size="icon" variant="ghost" aria-label={`Remove the reference to ${row.name || 'a secret'}`} onClick={() => setDraft((d) => ({ ...d, secrets: d.secrets.filter((r) => r.id !== row.id) }))}>
                    <Trash2 aria-hidden="true" />
                  </Button>
                </div>
                {problems.has(row.id) && (
                  <p id={`why-${row.id}`} className="mt-1 text-xs text-bad-ink">
                    {problems.get(row.id)}
                  </p>
                )}
              </li>
            ))}
          </ul>
          {secrets.isError && <ProblemNote error={secrets.error} />}
          <Button size="sm" variant="ghost" className={cn('-ml-2', draft.secrets.length > 0 && 'mt-2')} onClick={() => addSecret()}>
            <Plus aria-hidden="true" />
            Refer to a secret
          </Button>
        </div>
      </Card>

      <Fixed workload={workload} />

      {changes > 0 && (
        <div role="region" aria-label="Unsaved changes" className="sticky bottom-4 z-10 flex animate-rise flex-wrap items-center gap-3 rounded-xl border border-line-strong bg-panel px-4 py-2.5 shadow-float">
          <p className="min-w-0 flex-1 text-sm">
            <span className="font-medium">{plural(changes, 'change')}</span> <span className="text-muted max-sm:hidden">not applied yet</span>
          </p>
          <Button variant="ghost" onClick={() => setDraft(draftOf(base))}>
            Discard
          </Button>
          <Button variant="primary" disabled={problems.size > 0} onClick={() => setReviewing(true)}>
            Review and apply
          </Button>
        </div>
      )}

      {pasting && (
        <PasteEnv
          org={org}
          onClose={() => setPasting(false)}
          onDone={(plain, secret) => {
            merge(plain)
            refer(secret)
            void client.invalidateQueries({ queryKey: keys.secrets(org) })
            setPasting(false)
          }}
        />
      )}
      {making && (
        <SecretDialog
          org={org}
          onClose={() => setMaking(false)}
          onSaved={(saved) => {
            refer([saved])
            setMaking(false)
          }}
        />
      )}
      {reviewing && (
        <ReviewChanges
          org={org}
          name={workload.name}
          config={configOf(draft, base)}
          title="Review the changes"
          onClose={() => setReviewing(false)}
          onApplied={(next) => {
            setReviewing(false)
            client.setQueryData(keys.workload(org, workload.name), next)
            void client.invalidateQueries({ queryKey: keys.workload(org, workload.name) })
            void client.invalidateQueries({ queryKey: keys.workloads(org) })
            toast.ok(`Release ${next.release.number} made`, 'The workload starts anew with it.')
          }}
        />
      )}
    </div>
  )
}

/** What the rest of the release says; changed through the API. */
function Fixed({ workload }: { workload: Workload }) {
  const config = workload.release.config
  const rows: [string, string][] = []
  if (config.argv?.length) rows.push(['Command', config.argv.join(' ')])
  for (const port of config.ports ?? []) rows.push([`Port ${port.name}`, `${port.port} ${port.protocol}`])
  if (config.volume) rows.push(['Volume', `${mib(config.volume.size_mib)} at ${config.volume.path}`])
  for (const file of config.files) rows.push(['File', `${file.path}, ${file.content.length} characters`])
  if (rows.length === 0) return null
  const json = JSON.stringify({ config }, null, 2)
  return (
    <Card>
      <CardTitle aside={<CopyButton text={json} label="Copy the config as JSON" />}>
        <span className="inline-flex items-center gap-2">
          <FileCode2 className="size-4 text-muted" aria-hidden="true" />
          The rest of the config
        </span>
      </CardTitle>
      <dl className="px-4 py-2">
        {rows.map(([label, value]) => (
          <div key={label + value} className="flex gap-4 py-1.5 text-sm">
            <dt className="w-28 shrink-0 text-muted">{label}</dt>
            <dd className="min-w-0 font-mono text-xs leading-5 break-all text-ink-2">{value}</dd>
          </div>
        ))}
      </dl>
    </Card>
  )
}
