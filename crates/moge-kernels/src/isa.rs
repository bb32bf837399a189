//! Which CPU features kernels use: the only place that asks the CPU.

#[cfg(target_arch = "x86_64")]
use crate::simd::{Avx2, Avx512, Avx512Vnni, AvxVnni};
use crate::simd::{DotOp, Scalar, SimdOp};

/// A set of CPU features that this CPU has. Only this file makes one, so holding one proves the features.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Isa(Level);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Level {
    Scalar,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    AvxVnni,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni,
}

/// `MOGE_ISA` names an ISA that this CPU does not have, or none at all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownIsa {
    /// The name.
    pub name: String,
}

impl std::fmt::Display for UnknownIsa {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names: Vec<&str> = Isa::available().map(Isa::name).collect();
        write!(f, "MOGE_ISA={} is not one of this CPU's: {}", self.name, names.join(", "))
    }
}

impl std::error::Error for UnknownIsa {}

/// Every level, slowest first.
const LEVELS: &[Level] = &[
    Level::Scalar,
    #[cfg(target_arch = "x86_64")]
    Level::Avx2,
    #[cfg(target_arch = "x86_64")]
    Level::AvxVnni,
    #[cfg(target_arch = "x86_64")]
    Level::Avx512,
    #[cfg(target_arch = "x86_64")]
    Level::Avx512Vnni,
];

impl Level {
    fn is_available(self) -> bool {
        match self {
            Level::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => {
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Level::AvxVnni => Level::Avx2.is_available() && is_x86_feature_detected!("avxvnni"),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => {
                Level::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Vnni => Level::Avx512.is_available() && is_x86_feature_detected!("avx512vnni"),
        }
    }
}

impl Isa {
    /// Every ISA that this CPU has, slowest first; the first is [`Isa::scalar`].
    pub fn available() -> impl Iterator<Item = Isa> {
        LEVELS.iter().copied().filter(|level| level.is_available()).map(Isa)
    }

    /// The fastest ISA that this CPU has.
    pub fn best() -> Isa {
        Isa::available().last().unwrap_or(Isa::scalar())
    }

    /// The ISA that the environment variable `MOGE_ISA` names, else the best: for comparing ISAs, and for running
    /// tests on a slower one.
    ///
    /// # Errors
    /// If it names none of [`Isa::available`].
    pub fn select() -> Result<Isa, UnknownIsa> {
        let Some(name) = std::env::var_os("MOGE_ISA") else { return Ok(Isa::best()) };
        let name = name.to_string_lossy();
        Isa::named(&name).ok_or_else(|| UnknownIsa { name: name.into_owned() })
    }

    /// The ISA that every CPU has.
    pub fn scalar() -> Isa {
        Isa(Level::Scalar)
    }

    /// The ISA of this name, if this CPU has it: `scalar`, `avx2`, `avxvnni`, `avx512` or `avx512vnni`.
    pub fn named(name: &str) -> Option<Isa> {
        Isa::available().find(|isa| isa.name() == name)
    }

    /// Its name, as [`Isa::named`] takes it.
    pub fn name(self) -> &'static str {
        match self.0 {
            Level::Scalar => "scalar",
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Level::AvxVnni => "avxvnni",
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Vnni => "avx512vnni",
        }
    }

    /// Run the clone of `op` that was compiled for these features.
    #[inline]
    pub(crate) fn run<Op: SimdOp>(self, op: Op) -> Op::Output {
        match self.0 {
            Level::Scalar => op.run(Scalar),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `available` gives this level only if the CPU has the features.
            Level::Avx2 | Level::AvxVnni => unsafe { run_avx2(op) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `available` gives this level only if the CPU has the features.
            Level::Avx512 | Level::Avx512Vnni => unsafe { run_avx512(op) },
        }
    }

    /// As [`Isa::run`], for a body that works on integers: VNNI makes a difference to those alone.
    #[inline]
    pub(crate) fn run_dot<Op: DotOp>(self, op: Op) -> Op::Output {
        match self.0 {
            Level::Scalar => op.run(Scalar),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `available` gives this level only if the CPU has the features.
            Level::Avx2 | Level::Avx512 => unsafe { dot_avx2(op) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `available` gives this level only if the CPU has the features.
            Level::AvxVnni => unsafe { dot_avxvnni(op) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `available` gives this level only if the CPU has the features.
            Level::Avx512Vnni => unsafe { dot_avx512vnni(op) },
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn run_avx2<Op: SimdOp>(op: Op) -> Op::Output {
    // SAFETY: This function's caller had to know of the same features.
    op.run(unsafe { Avx2::new() })
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn run_avx512<Op: SimdOp>(op: Op) -> Op::Output {
    // SAFETY: This function's caller had to know of the same features.
    op.run(unsafe { Avx512::new() })
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn dot_avx2<Op: DotOp>(op: Op) -> Op::Output {
    // SAFETY: This function's caller had to know of the same features.
    op.run(unsafe { Avx2::new() })
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avxvnni,avx2,fma,f16c")]
fn dot_avxvnni<Op: DotOp>(op: Op) -> Op::Output {
    // SAFETY: This function's caller had to know of the same features.
    op.run(unsafe { AvxVnni::new() })
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512vnni,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn dot_avx512vnni<Op: DotOp>(op: Op) -> Op::Output {
    // SAFETY: This function's caller had to know of the same features.
    op.run(unsafe { Avx512Vnni::new() })
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::Isa;

    #[test]
    fn the_list_starts_with_scalar_and_ends_with_the_best() {
        let all: Vec<Isa> = Isa::available().collect();
        assert_eq!(all.first(), Some(&Isa::scalar()));
        assert_eq!(all.last(), Some(&Isa::best()));
    }

    #[test]
    fn every_available_isa_is_found_by_its_name_and_no_other_is() {
        for isa in Isa::available() {
            assert_eq!(Isa::named(isa.name()), Some(isa));
        }
        assert_eq!(Isa::named("neon9000"), None);
    }
}
