/* CRC-32C (Castagnoli), the checksum of a frame's header and meta block.
 *
 * The SSE4.2 instruction is used where the processor has it (asked once, at import);
 * elsewhere eight tables of 256 entries, which are built at import. */
#ifndef DISTGRAD_CRC32C_H
#define DISTGRAD_CRC32C_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the wire format is little-endian, and so must be the host"
#endif

#if (defined(__x86_64__) || defined(_M_X64)) && defined(__GNUC__)
#define CRC32C_HAVE_SSE42 1
#include <nmmintrin.h>
#else
#define CRC32C_HAVE_SSE42 0
#endif

static uint32_t crc32c_tables[8][256];
static int crc32c_accelerated;

static void crc32c_init(void) {
    const uint32_t reflected_polynomial = 0x82F63B78u;
    for (uint32_t byte = 0; byte < 256; ++byte) {
        uint32_t crc = byte;
        for (int bit = 0; bit < 8; ++bit)
            crc = (crc >> 1) ^ ((crc & 1) ? reflected_polynomial : 0);
        crc32c_tables[0][byte] = crc;
    }
    for (int row = 1; row < 8; ++row)
        for (int byte = 0; byte < 256; ++byte) {
            uint32_t crc = crc32c_tables[row - 1][byte];
            crc32c_tables[row][byte] = (crc >> 8) ^ crc32c_tables[0][crc & 0xFF];
        }
#if CRC32C_HAVE_SSE42
    __builtin_cpu_init();
    crc32c_accelerated = __builtin_cpu_supports("sse4.2") != 0;
#endif
}

/* Continue `crc` (0 at the start) over `size` bytes. */
static uint32_t crc32c_portable(uint32_t crc, const uint8_t *data, size_t size) {
    crc = ~crc;
    while (size >= 8) {
        uint64_t word;
        memcpy(&word, data, 8);
        word ^= crc;
        crc = 0;
        for (int byte = 0; byte < 8; ++byte)
            crc ^= crc32c_tables[7 - byte][(word >> (8 * byte)) & 0xFF];
        data += 8;
        size -= 8;
    }
    while (size--)
        crc = (crc >> 8) ^ crc32c_tables[0][(crc ^ *data++) & 0xFF];
    return ~crc;
}

#if CRC32C_HAVE_SSE42
__attribute__((target("sse4.2")))
static uint32_t crc32c_sse42(uint32_t crc, const uint8_t *data, size_t size) {
    uint64_t state = ~crc;
    while (size >= 8) {
        uint64_t word;
        memcpy(&word, data, 8);
        state = _mm_crc32_u64(state, word);
        data += 8;
        size -= 8;
    }
    while (size--)
        state = _mm_crc32_u8((uint32_t)state, *data++);
    return ~(uint32_t)state;
}
#endif

static uint32_t crc32c(uint32_t crc, const uint8_t *data, size_t size) {
#if CRC32C_HAVE_SSE42
    if (crc32c_accelerated)
        return crc32c_sse42(crc, data, size);
#endif
    return crc32c_portable(crc, data, size);
}

#endif
