import { type KeyboardEvent, lazy, type ReactNode, Suspense, useId, useRef, useState } from 'react'

export type MenuEntry =
  | { kind: 'item'; label: ReactNode; icon?: ReactNode; danger?: boolean; disabled?: boolean; onSelect: () => void }
  | { kind: 'radio'; label: string; value: string; onChange: (value: string) => void; options: { value: string; label: ReactNode; icon?: ReactNode }[] }
  | { kind: 'separator' }

const Popup = lazy(() => import('./menu-popup'))

/** A button that opens a menu. The popup's machinery is fetched on the first intent; the button is there from the start. */
export function Menu(props: { label?: string; className: string; children: ReactNode; entries: MenuEntry[]; align?: 'start' | 'end'; side?: 'top' | 'bottom'; width?: string }) {
  const [open, setOpen] = useState(false)
  const [used, setUsed] = useState(false)
  const button = useRef<HTMLButtonElement>(null)
  const id = useId()
  const show = () => {
    setUsed(true)
    setOpen(true)
  }
  return (
    <>
      <button
        ref={button}
        type="button"
        id={id}
        className={props.className}
        aria-label={props.label}
        aria-haspopup="menu"
        aria-expanded={open}
        onPointerEnter={() => setUsed(true)}
        onClick={() => (open ? setOpen(false) : show())}
        onKeyDown={(event: KeyboardEvent) => {
          if (event.key === 'ArrowDown' || event.key === 'ArrowUp') {
            event.preventDefault()
            show()
          }
        }}
      >
        {props.children}
      </button>
      {used && (
        <Suspense>
          <Popup open={open} onOpenChange={setOpen} anchor={button} labelledBy={id} entries={props.entries} align={props.align ?? 'end'} side={props.side ?? 'bottom'} width={props.width} />
        </Suspense>
      )}
    </>
  )
}
