import { Dialog as Base } from '@base-ui/react/dialog'
import { X } from 'lucide-react'
import type { ReactNode, RefObject } from 'react'
import { cn } from '@/lib/cn'
import { buttonStyles } from './button'

export interface DialogProps {
  open: boolean
  onOpenChange: (open: boolean) => void
  title: ReactNode
  description?: ReactNode
  children?: ReactNode
  footer?: ReactNode
  size?: 'sm' | 'md' | 'lg'
  initialFocus?: RefObject<HTMLElement | null>
}

export default function DialogImpl(props: DialogProps) {
  return (
    <Base.Root open={props.open} onOpenChange={props.onOpenChange}>
      <Base.Portal>
        <Base.Backdrop className="backdrop fixed inset-0 z-40 bg-black/40 transition-opacity duration-150 data-ending-style:opacity-0 data-starting-style:opacity-0 dark:bg-black/60" />
        <Base.Popup
          {...(props.initialFocus ? { initialFocus: props.initialFocus } : {})}
          className={cn(
            'fixed top-1/2 left-1/2 z-50 flex max-h-[calc(100dvh-2rem)] w-[calc(100vw-1.5rem)] -translate-x-1/2 -translate-y-1/2 flex-col overflow-hidden rounded-2xl border border-line bg-panel shadow-float transition-[opacity,scale] duration-150 data-ending-style:scale-[0.98] data-ending-style:opacity-0 data-starting-style:scale-[0.98] data-starting-style:opacity-0',
            { sm: 'max-w-sm', md: 'max-w-lg', lg: 'max-w-2xl' }[props.size ?? 'md'],
          )}
        >
          <div className="flex items-start gap-4 px-5 pt-5 pb-4">
            <div className="min-w-0 flex-1">
              <Base.Title className="text-lg font-semibold">{props.title}</Base.Title>
              {props.description && <Base.Description className="mt-1 text-sm text-muted">{props.description}</Base.Description>}
            </div>
            <Base.Close className={cn(buttonStyles({ variant: 'ghost', size: 'icon-sm' }), '-mt-1 -mr-1.5')} aria-label="Close">
              <X aria-hidden="true" />
            </Base.Close>
          </div>
          {props.children && <div className="min-h-0 flex-1 overflow-y-auto px-5 pt-0.5 pb-5">{props.children}</div>}
          {props.footer && <div className="flex flex-wrap justify-end gap-2 border-t border-line bg-sunken/60 px-5 py-3">{props.footer}</div>}
        </Base.Popup>
      </Base.Portal>
    </Base.Root>
  )
}
