import { Dialog } from '@base-ui/react/dialog'
import { X } from 'lucide-react'
import type { ReactNode, RefObject } from 'react'
import { cn } from '@/lib/cn'
import { buttonStyles } from './button'

/** The navigation on small screens: a panel from the left. A link inside it closes it. */
export default function Drawer({ open, onOpenChange, children, finalFocus }: { open: boolean; onOpenChange: (open: boolean) => void; children: ReactNode; finalFocus: RefObject<HTMLElement | null> }) {
  return (
    <Dialog.Root open={open} onOpenChange={onOpenChange}>
      <Dialog.Portal>
        <Dialog.Backdrop className="backdrop fixed inset-0 z-30 bg-black/40 transition-opacity duration-150 data-ending-style:opacity-0 data-starting-style:opacity-0" />
        <Dialog.Popup
          finalFocus={finalFocus}
          className="fixed inset-y-0 left-0 z-40 flex w-[min(18rem,85vw)] flex-col border-r border-line bg-sunken shadow-float transition-transform duration-200 data-ending-style:-translate-x-full data-starting-style:-translate-x-full"
          onClick={(event) => {
            if ((event.target as Element).closest('a')) onOpenChange(false)
          }}
        >
          <Dialog.Title className="sr-only">Navigation</Dialog.Title>
          <Dialog.Close className={cn(buttonStyles({ variant: 'ghost', size: 'icon' }), 'absolute top-3.5 right-2')} aria-label="Close navigation">
            <X aria-hidden="true" />
          </Dialog.Close>
          {children}
        </Dialog.Popup>
      </Dialog.Portal>
    </Dialog.Root>
  )
}
