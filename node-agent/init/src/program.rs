//! From what a frame says to what the kernel takes.

use std::ffi::CString;
use std::os::unix::ffi::OsStringExt;

use clawhq_init::{Exec, Step};
use zeroize::Zeroize;

use crate::sys;

/// Where a program without `/` is looked for when the environment has no `PATH`.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// NUL-terminated copies of a process' strings, overwritten when dropped.
pub struct Strings {
    paths: Vec<CString>,
    argv: Vec<CString>,
    env: Vec<CString>,
    cwd: Option<CString>,
}

impl Strings {
    /// The frame's checks have ruled NUL bytes out; one that is there all the same is EINVAL.
    pub fn new(
        argv: &[String],
        env: &[(String, String)],
        inherit_env: bool,
        cwd: Option<&str>,
    ) -> Result<Self, (Step, i32)> {
        let c = |bytes: Vec<u8>| CString::new(bytes).map_err(|_| (Step::Exec, libc::EINVAL));
        let mut variables: Vec<(&[u8], Vec<u8>)> = Vec::new();
        let inherited: Vec<(Vec<u8>, Vec<u8>)> = if inherit_env {
            std::env::vars_os().map(|(name, value)| (name.into_vec(), value.into_vec())).collect()
        } else {
            Vec::new()
        };
        for (name, value) in inherited
            .iter()
            .map(|(name, value)| (name.as_slice(), value.as_slice()))
            .chain(env.iter().map(|(n, v)| (n.as_bytes(), v.as_bytes())))
        {
            let mut pair = Vec::with_capacity(name.len() + value.len() + 2);
            pair.extend_from_slice(name);
            pair.push(b'=');
            pair.extend_from_slice(value);
            match variables.iter_mut().find(|(known, _)| *known == name) {
                Some((_, known)) => {
                    known.zeroize();
                    *known = pair;
                }
                None => variables.push((name, pair)),
            }
        }
        let program = argv.first().map(String::as_str).unwrap_or_default();
        let paths = if program.contains('/') {
            vec![c(program.into())?]
        } else {
            let path = variables
                .iter()
                .find(|(name, _)| *name == b"PATH")
                .map_or(DEFAULT_PATH.as_bytes(), |(_, pair)| &pair[5..]);
            path.split(|&byte| byte == b':')
                .map(|dir| {
                    let dir = if dir.is_empty() { b"." } else { dir };
                    c([dir, b"/", program.as_bytes()].concat())
                })
                .collect::<Result<_, _>>()?
        };
        Ok(Strings {
            paths,
            argv: argv
                .iter()
                .map(|arg| {
                    let mut bytes = Vec::with_capacity(arg.len() + 1);
                    bytes.extend_from_slice(arg.as_bytes());
                    c(bytes)
                })
                .collect::<Result<_, _>>()?,
            env: variables.into_iter().map(|(_, pair)| c(pair)).collect::<Result<_, _>>()?,
            cwd: cwd.map(|cwd| c(cwd.into())).transpose()?,
        })
    }

    pub fn of_exec(exec: &Exec) -> Result<Self, (Step, i32)> {
        Self::new(&exec.argv, &exec.env, exec.inherit_env, exec.cwd.as_deref())
    }

    pub fn program(&self, ids: Option<(u32, u32)>) -> sys::Program<'_> {
        sys::Program { paths: &self.paths, argv: &self.argv, env: &self.env, cwd: self.cwd.as_deref(), ids }
    }
}

impl Drop for Strings {
    fn drop(&mut self) {
        for string in self.argv.drain(..).chain(self.env.drain(..)) {
            string.into_bytes_with_nul().zeroize();
        }
    }
}
