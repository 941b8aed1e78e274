//! Who may do what: one table of role, action and noun.

/// What a member of an org is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    Member,
    Owner,
}

impl Role {
    pub const ALL: [Self; 2] = [Self::Member, Self::Owner];

    pub fn name(self) -> &'static str {
        match self {
            Self::Member => "member",
            Self::Owner => "owner",
        }
    }

    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|role| role.name() == text)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Action {
    Read,
    Create,
    Update,
    Delete,
    /// Run something inside, or read what it prints.
    Enter,
}

impl Action {
    pub const ALL: [Self; 5] = [Self::Read, Self::Create, Self::Update, Self::Delete, Self::Enter];
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Noun {
    Org,
    Member,
    ApiKey,
    Workload,
    Secret,
    Event,
}

impl Noun {
    pub const ALL: [Self; 6] = [Self::Org, Self::Member, Self::ApiKey, Self::Workload, Self::Secret, Self::Event];
}

/// Whether this role may do this to that. Deny unless said otherwise.
pub fn allows(role: Role, action: Action, noun: Noun) -> bool {
    use Action::{Create, Delete, Enter, Read, Update};
    match (noun, action) {
        (Noun::Workload, Read | Create | Update | Delete | Enter) => true,
        (Noun::Secret, Read | Create | Update | Delete) => true,
        (Noun::Event, Read) => true,
        (Noun::Org | Noun::Member | Noun::ApiKey, Read) => true,
        // Who may enter, and with which credentials, is the owner's to say.
        (Noun::Member | Noun::ApiKey, Create | Update | Delete) | (Noun::Org, Update | Delete) => role == Role::Owner,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_the_reviewed_one() {
        let mut table = String::from("role × action × noun: what each role may do (generated; review like code)\n\n");
        for noun in Noun::ALL {
            for action in Action::ALL {
                let who: Vec<_> =
                    Role::ALL.into_iter().filter(|role| allows(*role, action, noun)).map(Role::name).collect();
                table.push_str(&format!("{:<10}{:<8}{}\n", format!("{noun:?}"), format!("{action:?}"), who.join(" ")));
            }
        }
        crate::testing::snapshot("access-table.txt", &table);
    }

    #[test]
    fn an_owner_may_all_that_a_member_may() {
        for noun in Noun::ALL {
            for action in Action::ALL {
                assert!(!allows(Role::Member, action, noun) || allows(Role::Owner, action, noun));
            }
        }
    }
}
