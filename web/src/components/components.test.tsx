import { render, screen, waitFor } from '@testing-library/react'
import userEvent from '@testing-library/user-event'
import { useState } from 'react'
import { describe, expect, it, vi } from 'vitest'
import { ApiError } from '@/lib/problem'
import { setSingleKeys, useShortcuts } from '@/lib/shortcuts'
import { DiffView } from './diff-view'
import { Button } from './ui/button'
import { Confirm } from './ui/confirm'
import { Field, Input } from './ui/field'
import { Menu } from './ui/menu'
import { ErrorState, ProblemNote } from './ui/problem'
import { Waterfall } from './waterfall'

const refusal = new ApiError({ status: 409, code: 'name_taken', title: 'That name is in use', detail: 'Choose another.', requestId: 'req_42', errors: [{ pointer: '/name', detail: 'taken' }] })

describe('errors', () => {
  it('shows what, why, the code and the request id', () => {
    render(<ProblemNote error={refusal} />)
    expect(screen.getByRole('alert')).toHaveTextContent(/That name is in use.*Choose another.*\/name.*taken.*name_taken.*req_42/)
    expect(screen.getByRole('button', { name: 'Copy request id' })).toBeInTheDocument()
  })
  it('offers to try again, but not for what is missing', () => {
    const retry = vi.fn()
    const { rerender } = render(<ErrorState error={new TypeError('Failed to fetch')} onRetry={retry} />)
    screen.getByRole('button', { name: 'Try again' }).click()
    expect(retry).toHaveBeenCalledOnce()
    rerender(<ErrorState error={new ApiError({ status: 404, code: 'not_found', title: 'x' })} onRetry={retry} />)
    expect(screen.queryByRole('button', { name: 'Try again' })).toBeNull()
  })
})

describe('Field', () => {
  it('ties label, control and problem together', () => {
    render(
      <Field label="Name" error="too long">
        <Input />
      </Field>,
    )
    expect(screen.getByLabelText('Name')).toHaveAccessibleDescription('too long')
    expect(screen.getByLabelText('Name')).toBeInvalid()
  })
})

describe('Button', () => {
  it('cannot be pressed while busy, and keeps its focus', async () => {
    const press = vi.fn()
    const { rerender } = render(<Button onClick={press}>Go</Button>)
    await userEvent.click(screen.getByRole('button'))
    rerender(
      <Button busy onClick={press}>
        Go
      </Button>,
    )
    screen.getByRole('button').click()
    expect(press).toHaveBeenCalledOnce()
    expect(screen.getByRole('button')).toHaveFocus()
  })
})

describe('Confirm', () => {
  function Host({ run }: { run: () => Promise<unknown> }) {
    const [open, setOpen] = useState(true)
    return (
      <Confirm open={open} onOpenChange={setOpen} title="Delete it?" action="Delete" phrase="swift-otter" onConfirm={run}>
        Gone for good.
      </Confirm>
    )
  }
  it('wants the name typed, shows why it failed, and closes once done', async () => {
    const run = vi.fn().mockRejectedValueOnce(refusal).mockResolvedValueOnce(undefined)
    render(<Host run={run} />)
    const button = await screen.findByRole('button', { name: 'Delete' })
    expect(button).toBeDisabled()
    await userEvent.type(screen.getByLabelText(/Type swift-otter/), 'swift-otter')
    await userEvent.click(button)
    expect(await screen.findByText('name_taken')).toBeInTheDocument()
    await userEvent.click(screen.getByRole('button', { name: 'Delete' }))
    await waitFor(() => expect(screen.queryByRole('dialog')).toBeNull())
    expect(run).toHaveBeenCalledTimes(2)
  })
})

describe('Menu', () => {
  it('opens by key, chooses by key, and gives the focus back', async () => {
    const chosen = vi.fn()
    render(
      <Menu className="" entries={[{ kind: 'item', label: 'First', onSelect: vi.fn() }, { kind: 'item', label: 'Second', onSelect: chosen }]}>
        Actions
      </Menu>,
    )
    const button = screen.getByRole('button', { name: 'Actions' })
    button.focus()
    await userEvent.keyboard('{ArrowDown}')
    await screen.findByRole('menuitem', { name: 'First' })
    expect(button).toHaveAttribute('aria-expanded', 'true')
    screen.getByRole('menuitem', { name: 'Second' }).click()
    expect(chosen).toHaveBeenCalledOnce()
    await waitFor(() => expect(button).toHaveAttribute('aria-expanded', 'false'))
  })
})

describe('shortcuts', () => {
  function Host({ bindings }: { bindings: Record<string, () => void> }) {
    useShortcuts(bindings)
    return <input aria-label="field" />
  }
  it('runs keys and sequences, but not while text is typed or when switched off', async () => {
    const n = vi.fn()
    const go = vi.fn()
    const palette = vi.fn()
    render(<Host bindings={{ n, 'g w': go, 'mod+k': palette }} />)
    await userEvent.keyboard('ngw')
    expect([n.mock.calls.length, go.mock.calls.length]).toEqual([1, 1])
    await userEvent.type(screen.getByLabelText('field'), 'ngw')
    await userEvent.keyboard('{Control>}k{/Control}')
    expect([n.mock.calls.length, go.mock.calls.length, palette.mock.calls.length]).toEqual([1, 1, 1])
    screen.getByLabelText('field').blur()
    setSingleKeys(false)
    await userEvent.keyboard('n{Control>}k{/Control}')
    expect([n.mock.calls.length, palette.mock.calls.length]).toEqual([1, 2])
  })
})

it('shows a diff with secrets as names and versions', () => {
  render(<DiffView changes={[{ field: 'env.LOG_LEVEL', before: 'info', after: 'debug' }, { field: 'secrets.KEY.env OTHER', before: null, after: 'version 2' }, { field: 'image', before: 'a', after: 'b' }]} />)
  const rows = screen.getAllByRole('listitem').map((row) => row.textContent)
  expect(rows).toEqual(['env LOG_LEVEL−before: info+after: debug', 'secret KEY as env OTHER+after: version 2', 'image−before: a+after: b'])
})

it('draws each step where it lies', () => {
  render(<Waterfall steps={[{ name: 'claim', ms: 1 }, { name: 'ready', ms: 1 }]} placement="warm" />)
  expect(screen.getAllByRole('listitem').map((row) => row.textContent)).toEqual(['Claimed1.0 ms', 'Answering1.0 ms'])
})
