//! Interned strings: one copy of each text, four bytes a reference.

use std::collections::HashMap;
use std::sync::Arc;

/// A text held by an [`Interner`]. `Symbol(0)` is the empty text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Symbol(pub u32);

/// Bounded two-way table of texts. Entries are never removed: intern what has few values (countries, cities,
/// backend names), not what a stranger may choose freely.
pub struct Interner {
    texts: Vec<Arc<str>>,
    symbols: HashMap<Arc<str>, Symbol>,
    most: usize,
}

impl Interner {
    /// A table of at most `most` texts beside the empty one.
    pub fn new(most: usize) -> Self {
        let empty: Arc<str> = Arc::from("");
        Interner { texts: vec![empty.clone()], symbols: HashMap::from([(empty, Symbol(0))]), most }
    }

    /// The symbol of `text`, made if need be; `None` when the table is full.
    pub fn intern(&mut self, text: &str) -> Option<Symbol> {
        if let Some(symbol) = self.symbols.get(text) {
            return Some(*symbol);
        }
        if self.texts.len() > self.most {
            return None;
        }
        let symbol = Symbol(self.texts.len() as u32);
        let text: Arc<str> = Arc::from(text);
        self.texts.push(text.clone());
        self.symbols.insert(text, symbol);
        Some(symbol)
    }

    /// The symbol of `text` if it was interned before.
    pub fn find(&self, text: &str) -> Option<Symbol> {
        self.symbols.get(text).copied()
    }

    /// The text of `symbol`; empty for a symbol of another table.
    pub fn text(&self, symbol: Symbol) -> &str {
        self.texts.get(symbol.0 as usize).map_or("", |text| text)
    }

    /// Number of texts, the empty one included.
    pub fn len(&self) -> usize {
        self.texts.len()
    }

    pub fn is_empty(&self) -> bool {
        self.texts.len() == 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn same_text_same_symbol_until_full() {
        let mut table = Interner::new(2);
        let de = table.intern("DE").unwrap();
        assert_eq!(table.intern("DE"), Some(de));
        let fr = table.intern("FR").unwrap();
        assert_ne!(de, fr);
        assert_eq!(table.intern("IR"), None);
        assert_eq!(table.intern("FR"), Some(fr));
        assert_eq!((table.text(de), table.text(Symbol(0)), table.text(Symbol(99))), ("DE", "", ""));
        assert_eq!(table.find("IR"), None);
    }
}
